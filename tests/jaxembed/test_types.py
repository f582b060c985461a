"""The values that travel between the floors."""

import dataclasses

import numpy as np
import pytest
from sentence_transformers.sentence_transformer import modules

from jaxembed.types import Batch, Bucket, Column, Encoding, Pooling, PoolingMode


def test_bucket_counts_its_padding_and_names_itself() -> None:
    """Tokens are rows times length; the name is what logs and errors show."""
    bucket = Bucket(batch_size=4, seq_len=32)
    assert bucket.tokens == 128
    assert str(bucket) == "4x32"


def test_encoding_is_as_long_as_its_ids() -> None:
    """`len` counts tokens, and no prompt is the default."""
    encoding = Encoding(np.arange(5, dtype=np.int32))
    assert len(encoding) == 5
    assert encoding.prompt_length == 0


def test_batch_counts_real_rows() -> None:
    """Rows of padding have no owner."""
    assert Batch(Bucket(4, 8), np.zeros((4, len(Column) + 8), np.int32), np.arange(3)).rows == 3


def test_a_batch_is_one_array() -> None:
    """Its parts are views: whatever is written to one of them is in what goes to the device."""
    batch = Batch(Bucket(2, 3), np.zeros((2, len(Column) + 3), np.int32), np.arange(2))
    for column in Column:
        batch.column(column)[:] = 10 * column
    batch.input_ids[:] = [[1, 2, 3], [4, 5, 6]]
    numbers = [10 * column for column in Column]
    np.testing.assert_array_equal(batch.table, [[*numbers, 1, 2, 3], [*numbers, 4, 5, 6]])


def test_a_flat_batch_is_one_array() -> None:
    """First what is said of its rows, then all tokens."""
    columns = len(Column)
    batch = Batch(Bucket(2, 3, 5), np.zeros((1, 2 * columns + 5), np.int32), np.arange(2))
    batch.told[:] = np.arange(2 * columns).reshape(2, columns)
    batch.input_ids[:] = [[1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(batch.table, [[*range(2 * columns), 1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(batch.column(Column.PROMPT_LENGTH), [1, columns + 1])


@pytest.mark.parametrize(
    ("bucket", "tokens", "places", "name"), [((4, 8), 32, 32, "4x8"), ((4, 8, 20), 20, 32, "4x8/20")]
)
def test_what_a_shape_holds(bucket: tuple[int, ...], tokens: int, places: int, name: str) -> None:
    """Padded, all places are computed; flat, only attention has them."""
    shape = Bucket(*bucket)
    assert (shape.tokens, shape.places, str(shape)) == (tokens, places, name)


def test_values_are_frozen() -> None:
    """What one floor hands to the next, nobody changes on the way."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Encoding(np.zeros(1, np.int32)).prompt_length = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        Pooling().include_prompt = False


def test_pooling_modes_are_those_of_sentence_transformers() -> None:
    """The same names, in the order in which it concatenates them."""
    assert tuple(mode.value for mode in PoolingMode) == modules.Pooling.POOLING_MODES
