"""Memory of the process, as the system sees it."""

import ctypes
import functools
from collections.abc import Callable

__all__ = ["give_back"]


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
