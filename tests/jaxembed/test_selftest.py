"""The check that refuses a jaxlib that miscomputes."""

import numpy as np
import pytest

from jaxembed.errors import WrongNumbersError
from jaxembed.selftest import ROWS, check_numerics, squared_norms


def exact() -> np.ndarray:
    """The right answer, rounded once."""
    return (np.arange(ROWS, dtype=np.float64) ** 2).astype(np.float32)


def test_this_jaxlib_is_right() -> None:
    """The numbers themselves, beside the check."""
    check_numerics()
    np.testing.assert_allclose(squared_norms(), exact(), rtol=1e-6)


def test_the_right_answer_passes() -> None:
    """Rounding to float32 is no fault."""
    check_numerics(exact)


@pytest.mark.parametrize("row", [0, 1, ROWS - 1])
@pytest.mark.parametrize("value", [1065369600.0, np.nan, np.inf])
def test_one_wrong_row_is_enough(row: int, value: float) -> None:
    """The known fault has the last row wrong by 8e-3; any row, and any value that is not a number, must show."""

    def wrong() -> np.ndarray:
        numbers = exact()
        numbers[row] = value
        return numbers

    with pytest.raises(WrongNumbersError, match=f"returns wrong numbers: row {row} .*pip install 'jax!=0.10.2'"):
        check_numerics(wrong)
