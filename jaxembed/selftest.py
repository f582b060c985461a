"""Does this jaxlib compute rightly on this machine? jaxlib 0.10.2 on CPU does not.

A jitted float32 matrix-vector product followed by a sum of squares, which is the shape of an L2 norm, came out
wrong there (https://github.com/jax-ml/jax/issues/39103). pyproject.toml excludes that version; this check is for
whoever gets it, or a successor of the same kind, by another way.
"""

from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxembed.errors import WrongNumbersError

__all__ = ["ROWS", "check_numerics", "squared_norms"]

ROWS = 32_769
"""With fewer rows 0.10.2 is right: the fault begins with the row after a whole tile."""


def squared_norms() -> npt.NDArray[np.float32]:
    """Per row the sum of (eye(3) @ row) ** 2 over the float32 rows [i, 0, 0], i < ROWS: i ** 2, shape [ROWS]."""

    @jax.jit
    @jax.vmap
    def norm(row: jax.Array) -> jax.Array:
        return jnp.sum(jnp.matmul(jnp.eye(3, dtype=jnp.float32), row, precision=jax.lax.Precision.HIGHEST) ** 2)

    rows = np.zeros((ROWS, 3), np.float32)
    rows[:, 0] = np.arange(ROWS)
    return np.asarray(norm(rows))


def check_numerics(compute: Callable[[], npt.NDArray[np.float32]] = squared_norms) -> None:
    """Refuse a jaxlib that miscomputes.

    Args:
        compute: returns float32 [ROWS]; another function than the real one only in tests.

    Raises:
        WrongNumbersError: a result differs from the exact one by more than float32 rounding.
    """
    got = compute()
    want = np.arange(ROWS, dtype=np.float64) ** 2
    # Rounding an exact square to float32 moves it by at most 2**-24 (6e-8) of itself; the fault is 8e-3.
    error = np.abs(got - want) / np.maximum(want, 1.0)
    worst = int(np.argmax(error))
    if not error[worst] <= 1e-6:
        raise WrongNumbersError(
            f"jaxlib {version('jaxlib')} on {jax.default_backend()} returns wrong numbers: row {worst} of its test "
            f"gives {got[worst]:.0f} for {want[worst]:.0f}. Install another version: "
            "pip install 'jax!=0.10.2' 'jaxlib!=0.10.2'"
        )
