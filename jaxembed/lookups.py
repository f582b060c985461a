"""What is known of each token, before the first layer: rows of tables, summed up and normalised.

Letters in shapes are those of `layers` and `tokens`.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxembed import cpu_kernels
from jaxembed.kernels import tokens_there
from jaxembed.layers import Embedding, LayerNorm, by_cpu_kernels
from jaxembed.tokens import Tokens

__all__ = ["LookUp", "TokenTables", "embedded", "summed"]

LookUp = tuple[Embedding, Int[Array, "_ _"]]
"""A table and ids."""


def summed(lookups: Sequence[LookUp]) -> Float[Array, "L M D"]:
    """The sum of what each table has for its ids. Those of the first are [L, M], others may have axes of size 1."""
    first, *others = (embedding(ids) for embedding, ids in lookups)
    return sum(others, first)


def embedded(lookups: Sequence[LookUp], norm: LayerNorm) -> Float[Array, "L M D"]:
    """norm(`summed`); up to `Kernels.cpu_tokens` tokens by one of `cpu_kernels`."""
    ids = lookups[0][1]
    if by_cpu_kernels(ids, [embedding.table for embedding, _ in lookups]):
        tables = [(embedding.table[...], ids) for embedding, ids in lookups]
        return cpu_kernels.embed(tables, norm.numbers, tokens=tokens_there(ids))
    return norm(summed(lookups))


class TokenTables(nnx.Module):
    """Words (+ positions) (+ token types). What becomes of their sum is each architecture's.

    Args:
        vocab: V.
        width: D.
        dtype: of the tables.
        positions: of the table; 0 for none.
        types: token types; 0 for none.
    """

    def __init__(self, vocab: int, width: int, dtype: str, *, positions: int = 0, types: int = 0) -> None:
        self.word = Embedding((vocab, width), ("vocab", "embed"), dtype)
        self.position = Embedding((positions, width), ("position", "embed"), dtype) if positions else None
        self.token_type = Embedding((types, width), ("token_type", "embed"), dtype) if types else None
        self.types = types

    def lookups(self, tokens: Tokens) -> list[LookUp]:
        """All that is known of each token."""
        found = [(self.word, tokens.input_ids)]
        if self.position is not None:
            found.append((self.position, self.places(tokens)))
        if self.token_type is not None:
            # With one type only, both texts of a pair are of it.
            found.append((self.token_type, jnp.minimum(tokens.token_types, self.types - 1)))
        return found

    def places(self, tokens: Tokens) -> Int[Array, "_ M"]:
        """The row of the position table for each token."""
        return tokens.rows.places
