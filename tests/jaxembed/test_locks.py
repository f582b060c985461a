"""The lock that many share or one holds alone."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxembed.locks import SharedLock

LIMIT = 10.0
"""Seconds after which a test gives up waiting."""


def held(hold: Callable[..., object], got: threading.Event, go: threading.Event) -> None:
    """Get the lock, say so, and keep it until told."""
    with hold():
        got.set()
        assert go.wait(LIMIT)


def test_sharing_and_being_alone() -> None:
    """Two share it; whoever wants it alone waits for both, and those who come later wait for that one."""
    lock = SharedLock()
    got = {name: threading.Event() for name in ("first", "second", "alone", "late")}
    go = {name: threading.Event() for name in got}
    with ThreadPoolExecutor(4) as pool:
        sharing = [pool.submit(held, lock.shared, got[name], go[name]) for name in ("first", "second")]
        assert got["first"].wait(LIMIT) and got["second"].wait(LIMIT)
        alone = pool.submit(held, lock.alone, got["alone"], go["alone"])
        while not lock._waiting:
            pass
        late = pool.submit(held, lock.shared, got["late"], go["late"])
        go["first"].set()
        sharing[0].result(LIMIT)
        assert not got["alone"].wait(0.05) and not got["late"].is_set()
        go["second"].set()
        assert got["alone"].wait(LIMIT)
        assert not got["late"].wait(0.05)
        go["alone"].set()
        assert got["late"].wait(LIMIT)
        go["late"].set()
        for one in (*sharing, alone, late):
            one.result(LIMIT)


@pytest.mark.parametrize("kind", ["shared", "alone"])
def test_an_error_gives_it_back(kind: str) -> None:
    """Both ways to hold it."""
    lock = SharedLock()
    with pytest.raises(RuntimeError, match="inside"), getattr(lock, kind)():
        raise RuntimeError("inside")
    with lock.alone():
        pass
    with lock.shared():
        pass


def test_nobody_is_ever_beside_the_one_alone() -> None:
    """Many threads, each asking for it in turns."""
    lock, inside, seen = SharedLock(), [0, 0], set()
    counting = threading.Lock()

    def work(seed: int) -> None:
        for n in range(200):
            kind = int((seed + n) % 5 == 0)
            with lock.alone() if kind else lock.shared():
                with counting:
                    inside[kind] += 1
                    seen.add(tuple(inside))
                with counting:
                    inside[kind] -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8), timeout=60))
    assert all(alone == 0 or (alone == 1 and sharing == 0) for sharing, alone in seen)
