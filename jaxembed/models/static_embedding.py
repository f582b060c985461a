"""Static embeddings: one vector a token, no encoder at all (model2vec, potion, static-retrieval).

Reference: sentence-transformers' `StaticEmbedding`, in both forms of its weights; the mean over the tokens is left to
Pooling. A model2vec file may hold fewer vectors than tokens (`mapping`: token -> row) and a weight for each token.
Proven on random tables.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxembed.architecture import Architecture, Weight
from jaxembed.configs import read_fields
from jaxembed.layers import Embedding, parameter
from jaxembed.tokens import Tokens

__all__ = ["ARCHITECTURE", "Config", "StaticEmbedding"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes, which the loader reads off the arrays: such a checkpoint has no config.json of its own.

    Attributes:
        vocab_size: token ids there are.
        rows: vectors there are.
        hidden_size: D.
        mapped: whether `mapping` says which row a token has; otherwise its id does.
        weighted: whether each token's vector is multiplied by a weight.
    """

    vocab_size: int
    rows: int
    hidden_size: int
    mapped: bool = False
    weighted: bool = False

    @property
    def max_length(self) -> None:
        """No limit."""
        return None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read what `checkpoint.read_static` wrote.

        Raises:
            UnsupportedModelError: a size is missing.
        """
        return read_fields(cls, config)


class StaticEmbedding(nnx.Module):
    """The table.

    Args:
        config: sizes.
        dtype: of the table.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        self.embedding = Embedding((config.rows, config.hidden_size), ("vocab", "embed"), dtype)
        self.mapping = parameter((config.vocab_size,), ("vocab",), "int32") if config.mapped else None
        self.weights = parameter((config.vocab_size,), ("vocab",)) if config.weighted else None

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """One state: each token's vector."""
        ids = tokens.input_ids
        rows = ids if self.mapping is None else jnp.take(self.mapping[...], ids, mode="clip")
        vectors = self.embedding(rows)
        if self.weights is not None:
            vectors = vectors * jnp.take(self.weights[...], ids, mode="clip")[:, :, None]
        return [vectors]


TOKENS = {"mapping": Weight("mapping"), "weights": Weight("weights")}

ARCHITECTURE = Architecture(
    model_type="static_embedding",
    config=Config.from_hf,
    build=StaticEmbedding,
    weights={"embedding.table": Weight("embedding.weight"), **TOKENS},
    alternatives=({"embedding.table": Weight("embeddings"), **TOKENS},),
    # There is no limit, but each length is a shape to compile: longer inputs are a matter of `max_length`.
    default_length=8192,
)
