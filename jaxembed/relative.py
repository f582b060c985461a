"""Attention by the distance of two tokens: rows of numbers by distance laid out by query and key; T5's bias.

A distance is the key's place less the query's. Letters in shapes are those of `layers`.
"""

import math

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jaxtyping import Array, Float

from jaxembed.layers import Embedding

__all__ = ["DistanceBias", "distances", "log_buckets", "skew"]


def distances(length: int) -> npt.NDArray[np.int64]:
    """Every distance between `length` places in rising order, [2 T]: the columns that `skew` takes.

    From 1 - T to T: the last one never occurs; it makes the count even, so that one row can slide along another.
    """
    return np.arange(2 * length, dtype=np.int64) - (length - 1)


def skew(values: Float[Array, "*lead T R"]) -> Float[Array, "*lead T T"]:
    """Values by query and distance -> values by query and key.

    Each query's row is moved one place further than the one before it. Read without its first T - 1 numbers, and in
    rows that are one number shorter, the table moves on by itself: T x T numbers are never gathered one by one.

    Args:
        values: R = 2 T columns, in the order of `distances`.
    """
    *lead, length, around = values.shape
    flat = values.reshape(*lead, length * around)[..., length - 1 : length * around - 1]
    return flat.reshape(*lead, length, around - 1)[..., :length]


def log_buckets(distance: npt.NDArray[np.int64], buckets: int, max_distance: int) -> npt.NDArray[np.int32]:
    """T5's bucket of each distance (https://arxiv.org/abs/1910.10683, section 2.1).

    Half of the buckets are for keys behind the query. Of each half, one half are of single distances and the others
    grow by one factor up to `max_distance`; all that is further falls into the last. Where the logarithm hits a whole
    number, float32 in torch rounds to it: hence the slack.
    """
    half = buckets // 2
    single = half // 2
    away = np.abs(distance)
    octaves = np.log(np.maximum(away, single) / single) / math.log(max_distance / single) * (half - single)
    far = np.minimum(single + np.floor(octaves + 1e-6).astype(np.int64), half - 1)
    return np.asarray(half * (distance > 0) + np.where(away < single, away, far), np.int32)


class DistanceBias(nnx.Module):
    """What the distance of two tokens adds to their attention scores: a number for each bucket and head.

    The table is float32 always, as biases are: it is small, and its numbers go into an exponent.

    Args:
        buckets: see `log_buckets`; a row of the table each.
        max_distance: see `log_buckets`.
        num_heads: N.
        rows: of the checkpoint's table, where it has more than there are buckets.
    """

    def __init__(self, buckets: int, max_distance: int, num_heads: int, *, rows: int | None = None) -> None:
        self.buckets = Embedding((rows or buckets, num_heads), ("position", "heads"), "float32")
        self.count = buckets
        self.max_distance = max_distance

    def __call__(self, length: int) -> Float[Array, "1 N T T"]:
        """The bias for rows of `length` tokens."""
        rows = log_buckets(distances(length), self.count, self.max_distance)
        values = self.buckets(jnp.asarray(rows)).T[:, None]
        return skew(jnp.broadcast_to(values, (values.shape[0], length, values.shape[2])))[None]
