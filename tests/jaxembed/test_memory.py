"""Memory given back to the system, and C libraries that have no call for it."""

import ctypes
import gc
import platform
import resource
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxembed import memory
from jaxembed.memory import ALIGNED, CHUNK, Arena

BLOCKS = 2000
SIZE = 100_000
"""Too small for a mapping of its own, which would go back at once."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Look the call up again."""
    memory.malloc_trim.cache_clear()
    yield
    memory.malloc_trim.cache_clear()


def resident() -> int:
    """Bytes that the process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the call")
def test_what_was_freed_goes_back() -> None:
    """Freed below a block that is still in use, memory stays with glibc until it is told."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(SIZE) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    last = blocks.pop()
    for block in blocks:
        libc.free(block)
    before = resident()
    memory.give_back()
    assert before - resident() > BLOCKS * SIZE / 2
    libc.free(last)


class Knot:
    """Refers to itself: only the collector can free it."""

    def __init__(self) -> None:
        self.own = self


def test_what_lasts_is_looked_at_no_more() -> None:
    """By a collection, which has little to do then; but by the next `settle`, for by then some of it may be garbage."""
    knot = Knot()
    seen = weakref.ref(knot)
    memory.settle()
    assert gc.get_freeze_count() > len(gc.get_objects())
    del knot
    gc.collect()
    assert seen() is not None
    memory.settle()
    assert seen() is None


def test_another_c_library_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing happens, and nothing is raised."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.malloc_trim() is None
    memory.give_back()


def test_arrays_stand_one_behind_another() -> None:
    """Aligned, in one block as far as there is room, and none over another."""
    arena = Arena()
    arrays = [arena.empty((n, 3), np.dtype(kind)) for n in range(1, 40) for kind in ("float32", "int8", "float16")]
    begins = [array.ctypes.data for array in arrays]
    assert all(begin % ALIGNED == 0 for begin in begins)
    for array, begin, following in zip(arrays, begins, begins[1:], strict=False):
        assert 0 <= following - begin - array.nbytes < ALIGNED
    for value, array in enumerate(arrays):
        array[...] = value
    assert all((array == value).all() for value, array in enumerate(arrays))


def test_a_full_block_is_followed_by_another() -> None:
    """However large the array is; those before stay what they are."""
    arena = Arena()
    small, large, after = (arena.empty((size,), np.dtype("uint8")) for size in (CHUNK - 8, 2 * CHUNK, 8))
    assert (small.nbytes, large.nbytes, after.nbytes) == (CHUNK - 8, 2 * CHUNK, 8)
    assert not np.shares_memory(small, large) and not np.shares_memory(large, after)
    assert all(array.flags.c_contiguous and array.ctypes.data % ALIGNED == 0 for array in (small, large, after))
