"""The refiner beside a fake engine: when it looks, what it swaps, and that a failure harms nobody."""

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from fakes import FakeEngine, encoding, vector

from jaxembed.buckets import Ladder
from jaxembed.types import Bucket
from jaxembed_server.batcher import Batcher
from jaxembed_server.refiner import Refiner


class Engine(FakeEngine):
    """A fake engine that can be refined; a batch takes as long as it has tokens."""

    def __init__(self) -> None:
        super().__init__(Ladder([Bucket(1, 16), Bucket(4, 16)]))
        self.max_batch_tokens, self.batch_multiple, self.length_multiple = 64, 1, 1
        self.flat = self.counted = False
        self.made: list[Bucket] = []
        self.broken = False
        self.chosen: Ladder | None = None

    def time(self, bucket: Bucket, *, filled: bool) -> float:
        return bucket.tokens / 1e6

    def allow(self, ladder: Ladder) -> None: ...

    def compile(self, bucket: Bucket) -> None:
        if self.broken:
            raise RuntimeError("no compiler today")
        self.made.append(bucket)

    def adopt(self, ladder: Ladder) -> None:
        self.ladder = ladder

    def keep(self, ladder: Ladder) -> None:
        self.chosen = ladder

    def kept(self) -> Ladder | None:
        return self.chosen


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.005)


def test_shapes_follow_what_comes() -> None:
    """Nothing happens before enough has come; then every new shape is compiled before the swap."""
    engine = Engine()
    old = engine.ladder
    refiner = Refiner(engine, after=10)
    refiner.saw([3] * 9)
    assert engine.ladder is old and not engine.made
    refiner.saw([4])
    eventually(lambda: engine.ladder is not old)
    assert {bucket.seq_len for bucket in engine.ladder.buckets} == {4, 16}
    assert set(engine.made) == set(engine.ladder.buckets)
    eventually(lambda: engine.chosen is engine.ladder)
    refiner.close()


def test_shapes_are_made_ready_elsewhere_before_they_are_compiled() -> None:
    """Those that were left out or kept, and those that are chosen."""
    engine, told = Engine(), []

    def ahead(ladder: Ladder) -> None:
        told.append((ladder.buckets, tuple(engine.made)))

    whole = Ladder([*engine.ladder.buckets, Bucket(4, 8)])
    refiner = Refiner(engine, whole.buckets, after=10, ahead=ahead)
    eventually(lambda: engine.ladder.buckets == whole.buckets)
    refiner.saw([3] * 10)
    eventually(lambda: engine.chosen is not None)
    refiner.close()
    (first, before), (second, then) = told
    assert (first, before, then) == (whole.buckets, (), whole.buckets)
    assert set(engine.ladder.buckets) <= {*second, *whole.buckets}


@pytest.mark.parametrize("after", [0, 5])
def test_what_was_left_out_comes_at_once(after: int) -> None:
    """The whole ladder first, and then the one of an earlier run, unless shapes are never to be chosen."""
    engine = Engine()
    whole, engine.chosen = Ladder([*engine.ladder.buckets, Bucket(4, 8)]), Ladder([Bucket(2, 4), Bucket(2, 16)])
    refiner = Refiner(engine, whole.buckets, after=after)
    wanted = engine.chosen if after else whole
    eventually(lambda: engine.ladder.buckets == wanted.buckets)
    assert engine.made == [*whole.buckets, *(wanted.buckets if after else ())]
    refiner.close()


@pytest.mark.parametrize(("after", "counted"), [(5, True), (5, False), (0, True)])
def test_first_shapes_are_priced_where_tokens_are_counted(after: int, counted: bool) -> None:
    """Before anything has come, and kept for the next start; what was kept is not timed again."""
    engine = Engine()
    engine.counted, first = counted, engine.ladder
    refiner = Refiner(engine, [*first.buckets, Bucket(4, 8)], after=after)
    eventually(lambda: Bucket(4, 8) in engine.ladder.buckets)
    if after and counted:
        eventually(lambda: engine.chosen is not None)
        assert engine.chosen is engine.ladder
    refiner.close()
    assert (engine.chosen is not None) is bool(after and counted)


def test_shapes_that_cannot_be_timed_serve_on(caplog: pytest.LogCaptureFixture) -> None:
    """At the prices that they have."""
    engine = Engine()
    engine.counted, first = True, engine.ladder

    def time(bucket: Bucket, *, filled: bool) -> float:
        raise RuntimeError("no clock today")

    engine.time = time
    with caplog.at_level(logging.ERROR):
        refiner = Refiner(engine, after=5)
        eventually(lambda: "could not be timed" in caplog.text)
    refiner.close()
    assert engine.ladder is first and engine.chosen is None


def test_a_ladder_that_does_not_come_up_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """The part that is there serves on, and the looks go on."""
    engine = Engine()
    part, engine.broken = engine.ladder, True
    with caplog.at_level(logging.ERROR):
        refiner = Refiner(engine, [Bucket(4, 8), Bucket(4, 16)], after=1)
        eventually(lambda: "could not be brought up" in caplog.text)
    assert engine.ladder is part
    engine.broken = False
    refiner.saw([3] * 20)
    eventually(lambda: engine.ladder is not part)
    refiner.close()


def test_never() -> None:
    """0 switches it off: no thread is there."""
    # One that an earlier test left may end meanwhile.
    before = set(threading.enumerate())
    refiner = Refiner(Engine(), after=0)
    refiner.saw([3] * 10_000)
    assert set(threading.enumerate()) <= before
    refiner.close()


def test_a_failure_is_logged_and_the_next_look_may_do(caplog: pytest.LogCaptureFixture) -> None:
    """The old ladder serves on meanwhile."""
    engine = Engine()
    old, engine.broken = engine.ladder, True
    refiner = Refiner(engine, after=1)
    with caplog.at_level(logging.ERROR):
        refiner.saw([3])
        eventually(lambda: "could not be refined" in caplog.text)
    assert engine.ladder is old
    engine.broken = False
    refiner.saw([3] * 20)
    eventually(lambda: engine.ladder is not old)
    refiner.close()


def test_a_closed_one_ends_its_thread() -> None:
    """Nothing keeps looking after a shutdown."""
    refiner = Refiner(Engine(), after=1)
    refiner.close()
    eventually(lambda: not any(thread.name == "refine-ladder" for thread in threading.enumerate()))


@pytest.mark.parametrize("after", [0, 5])
def test_no_ladder_is_held(after: int) -> None:
    """One that was left is gone at once, and with it its executables: neither refiner nor batcher keeps it."""
    engine = Engine()
    whole = Ladder([*engine.ladder.buckets, Bucket(4, 8)])

    async def swaps() -> None:
        batcher = Batcher(engine, max_queue_tokens=1000)
        refiner = Refiner(engine, whole.buckets, after=after)
        eventually(lambda: engine.ladder.buckets == whole.buckets)
        await batcher.submit([encoding(1, 2)], dimensions=4, normalize=False)
        old = weakref.ref(engine.ladder)
        if after:
            refiner.saw([3] * 50)
            eventually(lambda: engine.chosen is engine.ladder)
        else:
            engine.ladder = Ladder(whole.buckets)
        await batcher.submit([encoding(1, 2)], dimensions=4, normalize=False)
        eventually(lambda: old() is None)
        refiner.close()
        batcher.close()

    asyncio.run(swaps())


def test_the_batcher_follows_the_engine() -> None:
    """Requests before and after a swap, which they do not notice."""
    engine = Engine()

    async def requests() -> None:
        batcher = Batcher(engine, max_queue_tokens=1000)
        for ladder in (engine.ladder, Ladder([Bucket(2, 4), Bucket(1, 16)])):
            engine.ladder = ladder
            got = await batcher.submit([encoding(1, 2), encoding(3)], dimensions=4, normalize=False)
            np.testing.assert_array_equal(got, np.stack([vector([1, 2]), vector([3])]))
            assert engine.batches[-1].bucket in ladder.buckets
        batcher.close()

    asyncio.run(requests())
