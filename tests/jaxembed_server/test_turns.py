"""Which batch is made and run when, without threads or an engine."""

import pytest
from fakes import encoding

from jaxembed.buckets import Ladder
from jaxembed.types import Bucket
from jaxembed_server.fair_queue import FairQueue, Flow
from jaxembed_server.turns import Taken, Turns

LADDER = Ladder(Bucket(size, 8) for size in (1, 2, 4, 8))
"""A request of up to 8 tokens is short; room for more of them, on one at a time, is 32 tokens."""


@pytest.fixture
def queue() -> FairQueue[Flow]:
    """Empty."""
    return FairQueue(LADDER)


def wait(queue: FairQueue[Flow], *lengths: int, priority: int = 0) -> Flow:
    """A request with rows of so many tokens."""
    flow = Flow(encodings=[encoding(*range(1, n + 1)) for n in lengths])
    queue.add(flow, priority)
    return flow


def run(turns: Turns[Flow]) -> Taken[Flow]:
    """Take an ordinary batch and let it run."""
    taken = turns.take(1)
    assert taken is not None and not taken.beside
    turns.prepare(taken)
    assert turns.may_run(taken) and turns.begin(taken, 1)
    return taken


def test_nothing_waits(queue: FairQueue[Flow]) -> None:
    turns = Turns(queue, 1)
    assert not turns.wanted
    assert turns.take(1) is None


def test_one_batch_ahead_if_it_would_be_full(queue: FairQueue[Flow]) -> None:
    """Of long requests, which nothing runs beside but short ones."""
    turns = Turns(queue, 1)
    wait(queue, *[8] * 8)
    first = run(turns)
    assert first.long and first.tokens == 64
    wait(queue, *[8] * 7)
    assert turns.take(1) is None
    wait(queue, *[8] * 9)
    assert turns.wanted
    ahead = turns.take(1)
    assert ahead is not None and ahead.tokens == 64
    turns.prepare(ahead)
    assert not turns.may_run(ahead)
    # And not two.
    assert turns.take(1) is None
    turns.end(first)
    assert turns.may_run(ahead)


def test_as_many_at_a_time_as_the_engine_runs(queue: FairQueue[Flow]) -> None:
    turns = Turns(queue, 2)
    wait(queue, *[8] * 24)
    run(turns), run(turns)
    third = turns.take(1)
    assert third is not None
    turns.prepare(third)
    assert not turns.may_run(third)


def test_short_requests_beside_a_long_batch(queue: FairQueue[Flow]) -> None:
    """At once, an eighth of the largest batch at most, and any number of times."""
    turns = Turns(queue, 1)
    wait(queue, *[8] * 8)
    run(turns)
    for _ in range(3):
        wait(queue, 4)
    for rows in (2, 1):
        beside = turns.take(4)
        assert beside is not None and beside.beside and len(beside.rows) == rows
    assert turns.take(4) is None


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_short_requests_beside_short_ones(queue: FairQueue[Flow], at_a_time: int) -> None:
    """One batch, half as large as the first at least, and only where the engine runs one at a time."""
    turns = Turns(queue, at_a_time)
    for _ in range(4):
        wait(queue, 8)
    first = run(turns)
    assert not first.long
    wait(queue, 8)
    assert turns.take(5) is None
    wait(queue, 8)
    assert turns.wanted == (at_a_time == 1)
    beside = turns.take(6)
    if at_a_time == 2:
        assert beside is None
        return
    assert beside is not None and beside.beside and len(beside.rows) == 2
    for _ in range(4):
        wait(queue, 8)
    assert turns.take(8) is None
    # One that is over makes room: the next ordinary batch, as there is enough for half of what runs beside.
    turns.end(first)
    turns.over(first)
    assert not run(turns).beside
    turns.over(beside)


def test_a_batch_that_is_outranked_is_given_up(queue: FairQueue[Flow]) -> None:
    """Its rows wait again, behind what is more urgent; so is one that nobody waits for."""
    turns = Turns(queue, 1)
    wait(queue, *[8] * 8, priority=1)
    taken = turns.take(1)
    assert taken is not None
    turns.prepare(taken)
    urgent = wait(queue, 8)
    assert not turns.begin(taken, 2)
    turns.over(taken)
    assert queue.tokens == 72
    again = run(turns)
    assert again.first.flow is urgent
    turns.end(again)
    turns.over(again)
    last = turns.take(1)
    assert last is not None
    turns.prepare(last)
    for row in last.rows:
        row.flow.dead = True
    assert not turns.begin(last, 0)
