"""Which batch is made and run when, without threads or an engine."""

import pytest
from fakes import encoding

from jaxembed.buckets import Ladder
from jaxembed.types import Bucket
from jaxembed_server.fair_queue import FairQueue, Flow
from jaxembed_server.turns import CALM, Taken, Turns

LADDER = Ladder(Bucket(size, 8) for size in (1, 2, 4))
"""Of up to 32 tokens; a request of up to 8 is short, and there is room for so many beside a long batch."""


@pytest.fixture
def queue() -> FairQueue[Flow]:
    """Empty."""
    return FairQueue(LADDER)


def wait(queue: FairQueue[Flow], *lengths: int, priority: int = 0) -> Flow:
    """A request with rows of so many tokens."""
    flow = Flow(encodings=[encoding(*range(1, n + 1)) for n in lengths])
    queue.add(flow, priority)
    return flow


def ordinary(turns: Turns[Flow]) -> Taken[Flow]:
    """Take an ordinary batch."""
    taken = turns.take(1)
    assert taken is not None and not taken.beside
    return taken


def run(turns: Turns[Flow]) -> Taken[Flow]:
    """Take an ordinary batch and let it run."""
    taken = ordinary(turns)
    assert turns.may_run(taken) and turns.begin(taken, 1)
    return taken


def finish(turns: Turns[Flow], taken: Taken[Flow]) -> None:
    """A batch has run and its rows are delivered."""
    if not taken.beside:
        turns.end(taken)
    turns.over(taken)


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_waits(queue: FairQueue[Flow], shared: bool) -> None:
    turns = Turns(queue, 2, shared=shared)
    assert not turns.wanted
    assert turns.take(1) is None


@pytest.mark.parametrize("at_a_time", [1, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_as_many_at_a_time_as_the_engine_runs_and_one_ahead(
    queue: FairQueue[Flow], at_a_time: int, shared: bool
) -> None:
    """And no more, however many rows wait."""
    turns = Turns(queue, at_a_time, shared=shared)
    wait(queue, *[8] * 40)
    running = [run(turns) for _ in range(at_a_time)]
    assert all(one.long and one.tokens == 32 for one in running)
    ahead = ordinary(turns)
    assert not turns.may_run(ahead)
    assert turns.take(1) is None
    finish(turns, running[0])
    assert turns.may_run(ahead)


@pytest.mark.parametrize("at_a_time", [1, 2])
def test_a_batch_on_a_device_is_made_ahead_only_if_it_would_be_full(queue: FairQueue[Flow], at_a_time: int) -> None:
    """It would wait for the one that runs, and may grow meanwhile."""
    turns = Turns(queue, at_a_time, shared=False)
    wait(queue, *[8] * 7)
    run(turns)
    assert turns.take(1) is None
    wait(queue, 8, 8)
    assert turns.wanted
    ahead = turns.take(1)
    assert ahead is not None and ahead.tokens == 32


@pytest.mark.parametrize("length", [4, 8])
def test_a_second_batch_on_shared_cores_once_it_would_be_half_as_large(queue: FairQueue[Flow], length: int) -> None:
    """Of short requests as of long ones; and a third only if it would be full."""
    queue.ladder = Ladder(Bucket(size, 8) for size in (1, 2, 3))
    turns = Turns(queue, 2, shared=True)
    for _ in range(3):
        wait(queue, length)
    first = run(turns)
    assert first.long == (length == 8)
    wait(queue, length)
    assert turns.take(4) is None
    wait(queue, length)
    assert len(run(turns).rows) == 2
    wait(queue, length)
    assert turns.take(6) is None
    for _ in range(5):
        wait(queue, length)
    assert not turns.may_run(ordinary(turns))


@pytest.mark.parametrize("shared", [True, False])
def test_short_requests_beside_a_long_batch(queue: FairQueue[Flow], shared: bool) -> None:
    """At once, a quarter of the largest batch at most, and any number of times."""
    turns = Turns(queue, 2, shared=shared)
    wait(queue, *[8] * 4)
    run(turns)
    for _ in range(3):
        wait(queue, 4)
    for rows in (2, 1):
        beside = turns.take(4)
        assert beside is not None and beside.beside and len(beside.rows) == rows
    assert turns.take(4) is None


def test_long_batches_run_one_at_a_time_while_short_requests_come(queue: FairQueue[Flow]) -> None:
    """On shared cores: until there have been `CALM` of them without any."""
    turns = Turns(queue, 2, shared=True)
    wait(queue, *[8] * 4 * (CALM + 10))
    both = [run(turns), run(turns)]
    wait(queue, 4, priority=-1)
    beside = turns.take(2)
    assert beside is not None and beside.beside
    for one in (*both, beside):
        finish(turns, one)
    alone = run(turns)
    for _ in range(CALM - 1):
        ahead = ordinary(turns)
        assert not turns.may_run(ahead)
        finish(turns, alone)
        assert turns.may_run(ahead) and turns.begin(ahead, 1)
        alone = ahead
    assert turns.may_run(ordinary(turns))


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_of_a_very_long_row_runs_alone_on_shared_cores(queue: FairQueue[Flow], shared: bool) -> None:
    """Two of them would take twice the memory, which grows with the square of the length."""
    queue.ladder = Ladder([Bucket(2, 8), Bucket(1, 100)])
    turns = Turns(queue, 2, shared=shared)
    wait(queue, 90, priority=-1)
    wait(queue, *[8] * 4)
    first = run(turns)
    assert first.outsize
    ahead = ordinary(turns)
    assert not ahead.outsize
    assert turns.may_run(ahead) == (not shared)
    finish(turns, first)
    assert turns.begin(ahead, 1)
    wait(queue, 90, priority=-1)
    assert turns.may_run(ordinary(turns)) == (not shared)


def test_long_batches_on_a_device_run_whatever_comes(queue: FairQueue[Flow]) -> None:
    turns = Turns(queue, 2, shared=False)
    wait(queue, 4)
    finish(turns, run(turns))
    wait(queue, *[8] * 12)
    run(turns)
    run(turns)


def outranked(queue: FairQueue[Flow]) -> tuple[Turns[Flow], Taken[Flow], Flow]:
    """Turns, a batch that was given up for a more urgent request, and that request."""
    turns = Turns(queue, 1, shared=True)
    wait(queue, *[8] * 4, priority=1)
    taken = ordinary(turns)
    urgent = wait(queue, 8)
    assert not turns.begin(taken, 2)
    return turns, taken, urgent


def test_a_batch_that_is_outranked_is_given_up(queue: FairQueue[Flow]) -> None:
    """Its rows wait again, behind what is more urgent; so is one that nobody waits for."""
    turns, taken, urgent = outranked(queue)
    turns.over(taken)
    assert queue.tokens == 40
    again = run(turns)
    assert again.first.flow is urgent
    turns.end(again)
    turns.over(again)
    last = ordinary(turns)
    for row in last.rows:
        row.flow.dead = True
    assert not turns.begin(last, 0)


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_that_is_ready_first_waits_for_a_more_urgent_one(queue: FairQueue[Flow], shared: bool) -> None:
    """It may be the larger one that is ready first, and behind it the other would wait for as long as it runs."""
    turns = Turns(queue, 2, shared=shared)
    query = wait(queue, 4)
    wait(queue, *[8] * 12)
    urgent, full = ordinary(turns), ordinary(turns)
    assert urgent.first.flow is query
    assert not turns.may_run(full)
    assert turns.may_run(urgent) and turns.begin(urgent, 2)
    # A batch that runs holds none up but by its place in the engine.
    assert turns.may_run(full) == (not shared)
    turns.end(urgent)
    assert turns.may_run(full)


def test_short_requests_run_beside_a_long_batch_that_is_being_made(queue: FairQueue[Flow]) -> None:
    """They would wait for its end if they were in the one after it."""
    turns = Turns(queue, 2, shared=True)
    wait(queue, *[8] * 12)
    coming = ordinary(turns)
    query = wait(queue, 4)
    assert turns.wanted
    beside = turns.take(2)
    assert beside is not None and beside.beside and beside.first.flow is query
    assert turns.may_run(coming)


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_that_is_ready_first_runs_where_there_is_room_for_both(queue: FairQueue[Flow], shared: bool) -> None:
    """On a CPU they run side by side; a device would take the less urgent one first."""
    turns = Turns(queue, 2, shared=shared)
    for _ in range(8):
        wait(queue, 8)
    urgent, ready = ordinary(turns), ordinary(turns)
    assert turns.may_run(ready) == shared
    assert turns.may_run(urgent)


def test_a_batch_that_could_not_be_made_holds_none_up(queue: FairQueue[Flow]) -> None:
    turns = Turns(queue, 1, shared=True)
    wait(queue, *[8] * 12)
    failed, following = ordinary(turns), ordinary(turns)
    assert not turns.may_run(following)
    assert turns.over(failed)
    assert turns.may_run(following)


def test_a_batch_given_up_is_not_taken_for_the_next_one_with_its_rows(queue: FairQueue[Flow]) -> None:
    turns, given_up, urgent = outranked(queue)
    urgent.dead = True
    again = ordinary(turns)
    assert again.first == given_up.first
    assert not turns.over(given_up)
    assert turns.may_run(again) and turns.begin(again, 1)
