"""Rows into the table of a batch and back: padded, flat, seen in part, and what does not fit."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.errors import BucketError
from jaxembed.packing import Row, pack
from jaxembed.types import Bucket, Column, Encoding

rows = st.builds(
    lambda ids, prompt, task, dimensions, normalize, owner: Row(
        Encoding(np.array(ids, np.int32), min(prompt, len(ids)), len(ids) // 2, task), dimensions, normalize, owner
    ),
    st.lists(st.integers(0, 30_000), max_size=12),
    st.integers(0, 12),
    st.integers(-1, 3),
    st.integers(1, 384),
    st.booleans(),
    st.integers(0, 10_000),
)


@given(st.lists(rows, max_size=6), st.integers(0, 3), st.integers(0, 5))
def test_pack_and_back(items: list[Row], spare_rows: int, spare_tokens: int) -> None:
    """What went in can be read off the batch; the rest is padding of length 0."""
    longest = max((len(row.encoding) for row in items), default=0)
    bucket = Bucket(len(items) + spare_rows or 1, longest + spare_tokens or 1)
    batch = pack(bucket, items)
    assert batch.bucket == bucket
    assert batch.rows == len(items)
    assert batch.input_ids.shape == (bucket.batch_size, bucket.seq_len)
    for i, row in enumerate(items):
        length = batch.column(Column.LENGTH)[i]
        np.testing.assert_array_equal(batch.input_ids[i, :length], row.encoding.ids)
        assert not batch.input_ids[i, length:].any()
        encoding = row.encoding
        wanted = (
            len(encoding),
            encoding.prompt_length,
            row.dimensions,
            row.normalize,
            encoding.second_start,
            encoding.task,
            len(encoding),
        )
        assert tuple(batch.table[i, : len(Column)]) == wanted
        assert batch.owners[i] == row.owner
    padding = slice(len(items), None)
    assert not batch.column(Column.LENGTH)[padding].any()
    assert not batch.column(Column.PROMPT_LENGTH)[padding].any()
    assert not batch.column(Column.NORMALIZE)[padding].any()
    assert (batch.column(Column.DIMENSIONS)[padding] == 1).all()
    assert not batch.column(Column.SECOND_START)[padding].any()
    assert (batch.column(Column.TASK)[padding] == -1).all()
    assert not batch.column(Column.TOKENS)[padding].any()
    assert not batch.input_ids[padding].any()
    assert batch.table.dtype == np.int32
    assert batch.owners.dtype == np.int64


@given(st.lists(rows, min_size=1, max_size=6), st.integers(0, 3), st.integers(0, 5), st.integers(0, 5))
def test_pack_flat_and_back(items: list[Row], spare_rows: int, spare_length: int, spare_tokens: int) -> None:
    """The rows stand one behind another; what is said of them is what a padded batch says."""
    lengths = [len(row.encoding) for row in items]
    length = (max(lengths) + spare_length) or 1
    count = len(items) + spare_rows
    bucket = Bucket(count, length, min(count * length, max(sum(lengths) + spare_tokens, length)))
    batch = pack(bucket, items)
    assert batch.input_ids.shape == (1, bucket.flat)
    ids = np.concatenate([row.encoding.ids for row in items])
    np.testing.assert_array_equal(batch.input_ids[0, : len(ids)], ids)
    assert not batch.input_ids[0, len(ids) :].any()
    padded = pack(Bucket(count, length), items)
    np.testing.assert_array_equal(batch.told, padded.told)
    np.testing.assert_array_equal(batch.owners, padded.owners)


def test_a_row_that_attention_sees_in_part() -> None:
    """All its ids are there; its length is what attention sees."""
    batch = pack(Bucket(1, 8), [Row(Encoding(np.arange(5, dtype=np.int32), attended=3), 4, True, 0)])
    assert batch.column(Column.LENGTH).tolist() == [3]
    assert batch.column(Column.TOKENS).tolist() == [5]
    assert batch.input_ids.tolist() == [[0, 1, 2, 3, 4, 0, 0, 0]]


def test_pack_refuses_what_does_not_fit() -> None:
    """Too many rows, one too long, or too many tokens together: never a silent cut."""
    row = Row(Encoding(np.arange(5, dtype=np.int32)), 4, True, 0)
    for count, bucket in ((2, Bucket(1, 8)), (1, Bucket(2, 4)), (3, Bucket(4, 8, 14))):
        message = f"{count} rows of up to 5 and together {5 * count} tokens do not fit the bucket {bucket}"
        with pytest.raises(BucketError, match=message):
            pack(bucket, [row] * count)
