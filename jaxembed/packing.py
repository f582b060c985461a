"""Rows -> the one table of a Batch. Knows no text and no device."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxembed.errors import BucketError
from jaxembed.types import NO_TASK, Batch, Bucket, Column, Encoding

__all__ = ["Row", "empty", "full", "pack"]

PADDING = np.array([0, 0, 1, 0, 0, NO_TASK, 0], np.int32)
"""What a row of padding says, in the order of `Column`: its vector is of one feature."""


class Row(NamedTuple):
    """One item on its way into a Batch; the fields are those of `types.Batch`."""

    encoding: Encoding
    dimensions: int
    normalize: bool
    owner: int


def pack(bucket: Bucket, rows: Sequence[Row]) -> Batch:
    """Put rows into the table of one Batch.

    Raises:
        BucketError: more rows, a longer row or more tokens than the bucket holds.
    """
    lengths = [len(row.encoding.ids) for row in rows]
    longest, tokens = max(lengths, default=0), sum(lengths)
    if len(rows) > bucket.batch_size or longest > bucket.seq_len or tokens > bucket.tokens:
        told = f"{len(rows)} rows of up to {longest} and together {tokens} tokens"
        raise BucketError(f"{told} do not fit the bucket {bucket}")
    batch = empty(bucket, [row.owner for row in rows])
    if not rows:
        return batch
    input_ids = batch.input_ids
    if bucket.flat:
        input_ids[0, :tokens] = np.concatenate([row.encoding.ids for row in rows])
    else:
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            input_ids[i, :length] = row.encoding.ids
    # In the order of Column, and written all at once: a number at a time takes three times as long.
    batch.told[: len(rows)] = [
        (
            length if encoding.attended is None else encoding.attended,
            encoding.prompt_length,
            dimensions,
            normalize,
            encoding.second_start,
            encoding.task,
            length,
        )
        for (encoding, dimensions, normalize, _), length in zip(rows, lengths, strict=True)
    ]
    return batch


def empty(bucket: Bucket, owners: Sequence[int] = ()) -> Batch:
    """A batch of nothing but padding, as far as is known yet."""
    rows, columns = bucket.batch_size, len(Column)
    shape = (1, rows * columns + bucket.flat) if bucket.flat else (rows, columns + bucket.seq_len)
    batch = Batch(bucket, np.zeros(shape, np.int32), np.array(owners, np.int64))
    batch.told[:] = PADDING
    return batch


def full(bucket: Bucket) -> Batch:
    """A batch without padding."""
    batch = empty(bucket, range(bucket.batch_size))
    lengths = np.diff(np.linspace(0, bucket.tokens, bucket.batch_size + 1).astype(np.int64))
    batch.column(Column.LENGTH)[:] = batch.column(Column.TOKENS)[:] = lengths
    return batch
