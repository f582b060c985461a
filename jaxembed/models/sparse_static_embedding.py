"""Sparse static embeddings: a weight for each token of the vocabulary, no encoder at all (SPLADE's cheap queries).

Reference: sentence-transformers' `SparseStaticEmbedding` (https://arxiv.org/abs/2411.04403): the entry of each token
that a text has is that token's weight, however often it has it. Proven on random weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxembed.architecture import Architecture, Weight
from jaxembed.configs import read_fields
from jaxembed.layers import parameter
from jaxembed.tokens import Tokens

__all__ = ["ARCHITECTURE", "Config", "SparseStaticEmbedding"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The size, which the loader reads off the array: such a checkpoint's config.json does not say it."""

    vocab_size: int

    @property
    def hidden_size(self) -> int:
        """Entries of a vector: one for each token."""
        return self.vocab_size

    @property
    def max_length(self) -> None:
        """No limit."""
        return None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read what `checkpoint.read_sparse_static` wrote.

        Raises:
            UnsupportedModelError: the size is missing.
        """
        return read_fields(cls, config)


class SparseStaticEmbedding(nnx.Module):
    """The weights.

    Args:
        config: the size.
        dtype: of matrices, of which there are none.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        self.weights = parameter((config.vocab_size,), ("vocab",))

    def sparse(self, tokens: Tokens) -> Float[Array, "B V"]:
        """Each token's weight at its place, 0 elsewhere."""
        tokens = tokens.padded
        weights = self.weights[...]
        rows = jnp.arange(tokens.mask.shape[0], dtype=jnp.int32)[:, None]
        there = jnp.zeros((tokens.mask.shape[0], weights.shape[0]), jnp.float32)
        there = there.at[rows, tokens.input_ids].max(tokens.mask.astype(jnp.float32))
        return there * weights[None]


ARCHITECTURE = Architecture(
    model_type="sparse_static_embedding",
    config=Config.from_hf,
    build=SparseStaticEmbedding,
    weights={"weights": Weight("weight")},
    sparse=True,
    # There is no limit, but each length is a shape to compile: longer inputs are a matter of `max_length`.
    default_length=8192,
)
