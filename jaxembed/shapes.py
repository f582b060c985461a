"""Shapes that might be compiled: of single rows and of several, padded and flat. Knows nothing of what comes."""

import math
from collections.abc import Iterable

from jaxembed.types import Bucket

__all__ = ["MEAN", "default_flat_shapes", "flat_shape", "flat_shapes", "padded_shapes", "rungs", "single"]

SHORTEST = 16

STEP = 4
"""Each size of a batch in the default ladder is so many times the next smaller one."""

COUNTED_STEP = 8
"""The same where tokens are counted."""

MEAN = 2 / 3
"""Mean length that rows of a flat shape are reckoned to have, in parts of its own, where nothing is known of them."""


def rungs(max_length: int) -> list[int]:
    """Powers of two from `SHORTEST` on below `max_length`, and that."""
    lengths = []
    rung = SHORTEST
    while rung < max_length:
        lengths.append(rung)
        rung *= 2
    return [*lengths, max_length]


def flat_shape(rows: int, length: int, tokens: int, *, counted: bool = False) -> Bucket:
    """The shape of so many rows of up to `length` tokens, `tokens` together.

    Flat, unless they fill all places and are not counted.
    """
    return Bucket(rows, length, 0 if rows * length == tokens and not counted else tokens)


def single(length: int, max_batch_tokens: int, *, counted: bool) -> Bucket:
    """The shape of a single row: padded, or flat where tokens are counted, unless it is longer than a batch."""
    return flat_shape(1, length, length, counted=counted and length <= max_batch_tokens)


def flat_shapes(length: int, sizes: Iterable[int], mean: float, *, counted: bool = False) -> list[Bucket]:
    """The shapes of several rows of up to `length` tokens, each a `flat_shape`.

    Args:
        length: T.
        sizes: N; there is no shape of one that does not hold two rows of T.
        mean: length of the rows, which says how many there is room for.
        counted: whether the tokens that there are are counted.
    """
    rows = min(mean, length)
    return [flat_shape(math.ceil(size / rows), length, size, counted=counted) for size in sizes if size >= 2 * length]


def padded_shapes(lengths: Iterable[int], max_batch_tokens: int, *, multiple: int = 1) -> list[Bucket]:
    """Of each length the batch sizes 1, 4, 16, ... and the fullest, each times `multiple`."""
    shapes = []
    for length in lengths:
        most = max(1, max_batch_tokens // (length * multiple))
        rows = 1
        while rows < most:
            shapes.append(Bucket(rows * multiple, length))
            rows *= STEP
        shapes.append(Bucket(most * multiple, length))
    return shapes


def default_flat_shapes(max_length: int, max_batch_tokens: int, *, counted: bool) -> list[Bucket]:
    """Of each of the `rungs` a single row, and several in shapes of all, a part, a part of that, ... of the tokens.

    Args:
        max_length: the longest row.
        max_batch_tokens: of the largest shape of several rows.
        counted: whether the tokens that there are are counted: then fewer will do. Else one of full rows is padded.
    """
    lengths, sizes, step = rungs(max_length), [max_batch_tokens], COUNTED_STEP if counted else STEP
    while sizes[-1] >= step * SHORTEST:
        sizes.append(sizes[-1] // step)
    shapes = [single(length, max_batch_tokens, counted=counted) for length in lengths]
    for length in lengths:
        shapes += flat_shapes(length, sizes, MEAN * length, counted=counted)
    # Many texts are as long as they may be.
    return shapes if counted else [*shapes, Bucket(max(1, max_batch_tokens // max_length), max_length)]
