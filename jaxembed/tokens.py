"""What an encoder is called with: the tokens of a batch, and where its rows stand among them.

Padded, each row has a line of its own, [B, T]. Flat, the rows stand one right behind another in a single line, [1, N]:
layers that look at one token at a time then compute no padding, and those that look along a row lay the rows out
(`Rows.apart`) and put them together again. Letters in shapes are those of `layers`; "L M" is either "B T" or "1 N".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxembed import cpu_kernels
from jaxembed.kernels import cpu_takes, tokens_there
from jaxembed.types import NO_TASK

__all__ = ["Rows", "Tokens"]


class Flat(NamedTuple):
    """Where tokens stand in the line, and in rows.

    Attributes:
        line: the place in the line of each place of each row; behind a row's end that of some other token.
        places: the place among all places of rows, row * T + place, of each token in the line.
        lengths: tokens of each row.
    """

    line: Int[Array, "B T"]
    places: Int[Array, " N"]
    lengths: Int[Array, " B"]


class Rows(NamedTuple):
    """Where the rows of a batch stand.

    Attributes:
        mask: tokens of each row that attention sees. They are the first ones in everything this project makes.
        flat: None where each row has a line of its own.
    """

    mask: Bool[Array, "B T"]
    flat: Flat | None = None

    @classmethod
    def in_line(cls, lengths: Int[Array, " B"], seen: Int[Array, " B"], *, tokens: int, length: int) -> "Rows":
        """Rows one behind another.

        Args:
            lengths: tokens of each row; together at most `tokens`.
            seen: how many of them attention sees.
            tokens: N.
            length: T, which no row exceeds.
        """
        ends = jnp.cumsum(lengths, dtype=jnp.int32)
        starts = ends - lengths
        places = jnp.arange(length, dtype=jnp.int32)[None]
        line = jnp.arange(tokens, dtype=jnp.int32)
        # What is behind the last row counts as its, at its last place.
        row = jnp.minimum(jnp.sum(line[None] >= ends[:, None], axis=0, dtype=jnp.int32), len(lengths) - 1)
        place = jnp.minimum(line - starts[row], length - 1)
        # What stands behind the last token of all may be no number at all.
        there = jnp.minimum(starts[:, None] + places, jnp.maximum(ends[-1] - 1, 0))
        return cls(places < seen[:, None], Flat(there, row * length + place, lengths))

    @property
    def length(self) -> int:
        """T."""
        return self.mask.shape[1]

    @property
    def places(self) -> Int[Array, "_ M"]:
        """The place of each token in its row; one line for all rows where they have the same."""
        if self.flat is None:
            return jnp.arange(self.length, dtype=jnp.int32)[None]
        return (self.flat.places % self.length)[None]

    @property
    def starts(self) -> Int[Array, " B"]:
        """The first token of each row, counted over all lines."""
        batch, length = self.mask.shape
        return jnp.arange(batch, dtype=jnp.int32) * length if self.flat is None else self.flat.line[:, 0]

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Tokens of each row, those of padding included that stand in its line."""
        batch, length = self.mask.shape
        return jnp.full(batch, length, jnp.int32) if self.flat is None else self.flat.lengths

    @property
    def total_tokens(self) -> Int[Array, ""]:
        """Tokens of all rows together, as `lengths`."""
        return jnp.sum(self.lengths, dtype=jnp.int32)

    def apart(self, x: Shaped[Array, "L M *rest"]) -> Shaped[Array, "B T *rest"]:
        """What stands in lines, by rows. Behind a row's end some other token stands."""
        return x if self.flat is None else jnp.take(x[0], self.flat.line, axis=0, mode="clip")

    def together(self, x: Shaped[Array, "B T *rest"]) -> Shaped[Array, "L M *rest"]:
        """What stands by rows, in lines."""
        if self.flat is None:
            return x
        return jnp.take(x.reshape(-1, *x.shape[2:]), self.flat.places, axis=0, mode="clip")[None]

    def one(self, x: Shaped[Array, "L M D"], places: Int[Array, " B"]) -> Shaped[Array, "B D"]:
        """Of each row the token at one of its places."""
        if self.flat is None:
            return jnp.take_along_axis(x, places[:, None, None], axis=1)[:, 0]
        return jnp.take(x[0], jnp.take_along_axis(self.flat.line, places[:, None], axis=1)[:, 0], axis=0, mode="clip")

    def total(self, x: Float[Array, "L M D"], weights: Float[Array, "B T"]) -> Float[Array, "B D"]:
        """The sum of each row's tokens, each times its weight. In line, no place without a token takes part.

        Up to `Kernels.cpu_tokens` tokens by one of `cpu_kernels`.
        """
        if cpu_takes(x):
            return cpu_kernels.totals(x, weights, self.starts, self.lengths, tokens=tokens_there(x))
        if self.flat is None:
            return jnp.sum(x * weights[:, :, None], axis=1)
        line, starts = jnp.arange(x.shape[1], dtype=jnp.int32)[None], self.starts[:, None]
        own = (line >= starts) & (line < starts + self.lengths[:, None])
        spread = jnp.where(own, self.together(weights), 0.0)
        there = line[0][:, None] < self.total_tokens
        return jnp.matmul(spread, jnp.where(there, x[0], 0.0), precision=jax.lax.Precision.HIGHEST)

    def each(self, values: Shaped[Array, " B"]) -> Shaped[Array, "L _"]:
        """What is said of each row, for each of its tokens; to be broadcast."""
        return values[:, None] if self.flat is None else values[self.flat.places // self.length][None]


class Tokens(NamedTuple):
    """What an encoder is called with.

    Attributes:
        input_ids: token ids; what stands in the padding is arbitrary.
        token_types: 0, or 1 for the second text of a pair.
        tasks: which task each row asks for (`Architecture.tasks`); negative for none.
        rows: where the rows stand.
    """

    input_ids: Int[Array, "L M"]
    token_types: Int[Array, "L M"]
    tasks: Int[Array, " B"]
    rows: Rows

    @classmethod
    def plain(cls, input_ids: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> "Tokens":
        """Padded single texts that ask for no task.

        Args:
            input_ids: token ids.
            mask: tokens that are not padding.
        """
        return cls(input_ids, jnp.zeros_like(input_ids), jnp.full(input_ids.shape[:1], NO_TASK, jnp.int32), Rows(mask))

    @property
    def mask(self) -> Bool[Array, "B T"]:
        """Tokens of each row that attention sees."""
        return self.rows.mask

    @property
    def padded(self) -> "Tokens":
        """The same with a line for each row."""
        apart = self.rows.apart
        return Tokens(apart(self.input_ids), apart(self.token_types), self.tasks, Rows(self.rows.mask))
