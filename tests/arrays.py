"""Arrays that tests compute with."""

import numpy as np
import numpy.typing as npt

__all__ = ["normal"]


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> npt.NDArray[np.float32]:
    """Random numbers of a standard normal distribution, float32, of those that there are in a dtype."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype).astype(np.float32)
