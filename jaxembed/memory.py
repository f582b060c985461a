"""Memory of the process: in large blocks, given back to the system, and taken for lasting."""

import ctypes
import functools
import gc
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Arena", "give_back", "settle"]

ALIGNED = 64
"""JAX on CPU takes an array over as it is where it begins at a multiple of so many bytes."""

CHUNK = 64 * 2**20
"""Bytes that are asked of the system at a time. What is not written to is not resident, but for the page it shares."""


class Arena:
    """Arrays one right behind another in few large blocks, which live as long as any of them.

    NumPy asks Linux to keep blocks of 4 MB and more in huge pages, where the system has them on request. Read from
    there, matrices that a processor's caches do not hold come faster (docs/performance.md).
    """

    def __init__(self) -> None:
        self._chunk = np.empty(0, np.uint8)
        self._used = 0

    def empty(self, shape: Sequence[int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """An array in row-major order, not initialised, aligned for JAX to take it over."""
        size = math.prod(shape) * dtype.itemsize
        if self._used + size > len(self._chunk):
            self._chunk = np.empty(max(size, CHUNK) + ALIGNED, np.uint8)
            self._used = -self._chunk.ctypes.data % ALIGNED
        found = self._chunk[self._used : self._used + size].view(dtype).reshape(shape)
        self._used += -(-size // ALIGNED) * ALIGNED
        return found


def settle() -> None:
    """Take what there is now for lasting, and give back what was freed.

    Python's garbage collector goes through all objects now and then, with the interpreter's lock held: some 0.1 s where
    JAX is loaded, in which a server answers nothing (docs/performance.md). It leaves out what was there at the last
    call. This itself is such a pause. Safe to call from any thread.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    give_back()


def give_back() -> None:
    """Give memory that was freed back to the system, where the C library has a call for it (glibc).

    XLA frees much after it has compiled or loaded an executable, in small pieces, and glibc keeps all of it: about as
    much again as the executable itself holds. Safe to call from any thread.
    """
    trim = malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def malloc_trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim(3); None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # Another C library; on Windows there is no library by no name.
        return None
