"""The batcher with a fake engine: every request gets its own rows, and every way out completes."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from fakes import FakeEngine, encoding, vector
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxembed.buckets import Ladder
from jaxembed.errors import BucketError
from jaxembed.types import Bucket, Column
from jaxembed_server.batcher import Batcher
from jaxembed_server.errors import NotReadyError, QueueFullError

LIMIT = 10_000


def run(engine: FakeEngine, use: Callable[[Batcher], Awaitable[None]], limit: int = LIMIT) -> None:
    """Run a test on a loop of its own, at most 30 s, with a batcher that is closed at the end."""

    async def main() -> None:
        batcher = Batcher(engine, max_queue_tokens=limit)
        try:
            async with asyncio.timeout(30):
                await use(batcher)
        finally:
            engine.gate.set()
            batcher.close()

    asyncio.run(main())


def submit(batcher: Batcher, *rows: tuple[int, ...], **options: int) -> "asyncio.Task[np.ndarray]":
    options = {"dimensions": 4, "normalize": False, **options}
    return asyncio.get_running_loop().create_task(batcher.submit([encoding(*row) for row in rows], **options))


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def started(engine: FakeEngine) -> None:
    """Wait until the engine holds a batch."""
    assert await asyncio.to_thread(engine.started.wait, 10)


def hold(engine: FakeEngine) -> None:
    engine.gate.clear()
    engine.started.clear()


async def occupy(engine: FakeEngine, batcher: Batcher) -> "asyncio.Task[np.ndarray]":
    """Have the engine hold a batch of one row until its gate is opened."""
    hold(engine)
    task = submit(batcher, (1,))
    await started(engine)
    return task


def test_one_row() -> None:
    async def use(batcher: Batcher) -> None:
        result = await submit(batcher, (5, 6))
        np.testing.assert_array_equal(result, [vector([5, 6])])
        assert batcher.queued_tokens == 0

    run(FakeEngine(), use)


def test_no_rows() -> None:
    async def use(batcher: Batcher) -> None:
        assert (await submit(batcher)).shape == (0, 4)

    run(FakeEngine(), use)


@settings(max_examples=25)
@given(st.lists(st.lists(st.integers(1, 16), min_size=1, max_size=20), min_size=1, max_size=8), st.integers(1, 2))
def test_every_request_gets_its_own_rows_in_order(lengths: list[list[int]], in_flight: int) -> None:
    requests = [[tuple(range(k + 1, k + 1 + n)) for n in rows] for k, rows in enumerate(lengths)]

    async def use(batcher: Batcher) -> None:
        results = await asyncio.gather(*(submit(batcher, *rows) for rows in requests))
        for rows, result in zip(requests, results, strict=True):
            np.testing.assert_array_equal(result, [vector(row) for row in rows])
        assert batcher.queued_tokens == 0

    engine = FakeEngine(side_by_side=in_flight)
    run(engine, use)
    assert engine.rows == sum(map(len, requests))


def test_a_batch_is_what_queued_up_while_the_engine_was_busy() -> None:
    engine = FakeEngine(Ladder([Bucket(1, 4), Bucket(8, 4)]))

    async def use(batcher: Batcher) -> None:
        first = await occupy(engine, batcher)
        others = [submit(batcher, (n,)) for n in range(2, 8)]
        await settle()
        engine.gate.set()
        await asyncio.gather(first, *others)

    run(engine, use)
    assert [batch.rows for batch in engine.batches] == [1, 6]


def test_a_full_batch_is_made_ahead_but_runs_only_when_the_engine_is_free() -> None:
    engine = FakeEngine(Ladder([Bucket(1, 4), Bucket(2, 4)]))

    async def use(batcher: Batcher) -> None:
        first = await occupy(engine, batcher)
        others = submit(batcher, *[(n, n, n, n) for n in range(2, 8)])
        await settle()
        assert len(engine.batches) == 1
        engine.gate.set()
        await asyncio.gather(first, others)

    run(engine, use)
    assert [batch.rows for batch in engine.batches] == [1, 2, 2, 2]


def test_a_large_request_is_split_and_put_together_again() -> None:
    rows = [tuple(range(1, 2 + n % 16)) for n in range(100)]

    async def use(batcher: Batcher) -> None:
        np.testing.assert_array_equal(await submit(batcher, *rows), [vector(row) for row in rows])

    engine = FakeEngine()
    run(engine, use)
    assert len(engine.batches) >= 25


def test_a_row_without_tokens() -> None:
    """As an empty text is for a model without special tokens: no device thread may end over it."""

    async def use(batcher: Batcher) -> None:
        for _ in range(8):
            np.testing.assert_array_equal(await submit(batcher, ()), [vector([])])
        np.testing.assert_array_equal(await submit(batcher, (), (1, 2), ()), [vector(row) for row in ([], [1, 2], [])])

    run(FakeEngine(), use)


def test_requests_of_other_sizes_share_a_batch() -> None:
    engine = FakeEngine(Ladder([Bucket(4, 4)]))

    async def use(batcher: Batcher) -> None:
        first = await occupy(engine, batcher)
        two, three = submit(batcher, (7, 8), dimensions=2), submit(batcher, (9,), dimensions=3, normalize=True)
        await settle()
        engine.gate.set()
        await first
        assert (await two).tolist() == [[15, 2]]
        assert (await three).tolist() == [[9, 1, 9]]

    run(engine, use)
    batch = engine.batches[-1]
    assert batch.rows == 2
    asked = batch.table[:, [Column.DIMENSIONS, Column.NORMALIZE]].tolist()
    assert sorted(asked)[-2:] == [[2, False], [3, True]]


def test_a_failing_engine_reaches_its_caller_and_no_other() -> None:
    engine = FakeEngine()

    async def use(batcher: Batcher) -> None:
        engine.failure = RuntimeError("out of memory")
        with pytest.raises(RuntimeError, match="out of memory"):
            await submit(batcher, (1,), (2,))
        engine.failure = None
        assert (await submit(batcher, (3,))).tolist() == [[3, 1, 3, 1]]
        assert batcher.queued_tokens == 0

    run(engine, use)


def test_a_request_fails_once_when_one_of_its_batches_does() -> None:
    engine = FakeEngine(Ladder([Bucket(1, 16)]))

    async def use(batcher: Batcher) -> None:
        hold(engine)
        request = submit(batcher, *[(n,) for n in range(1, 9)])
        await started(engine)
        engine.failure = RuntimeError("once")
        engine.gate.set()
        with pytest.raises(RuntimeError, match="once"):
            await request
        engine.failure = None
        # What was left of the failed request is dropped, not run.
        assert (await submit(batcher, (3,))).tolist() == [[3, 1, 3, 1]]

    run(engine, use)
    assert engine.rows < 9


def test_an_engine_that_returns_too_few_rows_is_an_error() -> None:
    engine = FakeEngine()
    engine.spoil = lambda vectors: vectors[:-1]

    async def use(batcher: Batcher) -> None:
        with pytest.raises(ValueError, match="returned"):
            await submit(batcher, (1,), (2,))

    run(engine, use)


def test_a_row_longer_than_the_ladder_is_refused_at_once() -> None:
    async def use(batcher: Batcher) -> None:
        with pytest.raises(BucketError, match="17 tokens"):
            await submit(batcher, tuple(range(1, 18)))
        assert batcher.queued_tokens == 0

    run(FakeEngine(), use)


def test_cancelled_requests_are_not_run() -> None:
    engine = FakeEngine()

    async def use(batcher: Batcher) -> None:
        first = await occupy(engine, batcher)
        gone = [submit(batcher, (2,), (3,)) for _ in range(5)]
        stays = submit(batcher, (4,))
        await settle()
        for task in gone:
            task.cancel()
        await settle()
        assert batcher.queued_tokens == 2
        engine.gate.set()
        await asyncio.gather(first, stays)
        assert all(task.cancelled() for task in gone)

    run(engine, use)
    assert engine.rows == 2


def test_a_batch_made_ahead_is_dropped_when_all_its_clients_go() -> None:
    engine = FakeEngine(Ladder([Bucket(1, 4)]))

    async def use(batcher: Batcher) -> None:
        first = await occupy(engine, batcher)
        gone = submit(batcher, (2, 2, 2, 2))
        await asyncio.sleep(0.05)
        gone.cancel()
        await settle()
        engine.gate.set()
        await first
        assert (await submit(batcher, (3,))).tolist() == [[3, 1, 3, 1]]

    run(engine, use)
    assert [batch.input_ids[0, 0] for batch in engine.batches] == [1, 3]


def test_overload_is_refused_and_says_when_to_come_back() -> None:
    engine = FakeEngine()

    async def use(batcher: Batcher) -> None:
        await submit(batcher, (1, 2))  # Gives the batcher a drain rate.
        hold(engine)
        first = submit(batcher, *[(1, 2, 3, 4)] * 5)
        await started(engine)
        with pytest.raises(QueueFullError, match="20 tokens are waiting, 20 may") as refused:
            await submit(batcher, (1,))
        assert refused.value.retry_after > 0
        engine.gate.set()
        await first
        await submit(batcher, (1,))

    run(engine, use, limit=20)


def test_a_request_larger_than_the_queue_runs_when_nothing_waits() -> None:
    async def use(batcher: Batcher) -> None:
        assert len(await submit(batcher, *[(1, 2, 3, 4)] * 5)) == 5

    run(FakeEngine(), use, limit=3)


def test_drain_finishes_what_is_in_and_takes_no_more() -> None:
    engine = FakeEngine()

    async def use(batcher: Batcher) -> None:
        hold(engine)
        waiting = [submit(batcher, (n,)) for n in range(1, 10)]
        await started(engine)
        draining = asyncio.create_task(batcher.drain())
        await settle()
        with pytest.raises(NotReadyError):
            await submit(batcher, (1,))
        assert not draining.done()
        engine.gate.set()
        await draining
        assert [task.result()[0][0] for task in waiting] == list(range(1, 10))

    run(engine, use)


def test_draining_an_idle_batcher_returns_at_once() -> None:
    async def use(batcher: Batcher) -> None:
        await batcher.drain()

    run(FakeEngine(), use)


def test_close_fails_what_waits_and_ends_the_threads() -> None:
    engine = FakeEngine()

    async def use(batcher: Batcher) -> None:
        hold(engine)
        waiting = [submit(batcher, (n,)) for n in range(1, 10)]
        await started(engine)
        batcher.close()
        for task in waiting:
            with pytest.raises(NotReadyError):
                await task
        engine.gate.set()
        for thread in [t for t in threading.enumerate() if t.name.startswith("device-")]:
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()

    run(engine, use)


def order_of_first_ids(engine: FakeEngine) -> list[int]:
    return [int(i) for batch in engine.batches for i in batch.input_ids[: batch.rows, 0]]


def test_a_single_query_passes_a_bulk_job() -> None:
    engine = FakeEngine(Ladder([Bucket(1, 4)]))

    async def use(batcher: Batcher) -> None:
        hold(engine)
        bulk = submit(batcher, *[(7, 7, 7, 7)] * 50)
        await started(engine)
        query = submit(batcher, (9,))
        await settle()
        engine.gate.set()
        await asyncio.gather(query, bulk)

    run(engine, use)
    assert order_of_first_ids(engine).index(9) <= 3


def test_short_requests_run_beside_a_bulk_job_and_not_behind_it() -> None:
    """They are answered while the bulk job's batch is still on the device, and share no batch with its rows."""
    engine = FakeEngine(Ladder([Bucket(1, 4), Bucket(4, 4), Bucket(8, 4)]))
    engine.held = lambda batch: 7 in batch.input_ids

    async def use(batcher: Batcher) -> None:
        hold(engine)
        bulk = submit(batcher, *[(7, 7, 7, 7)] * 50)
        await started(engine)
        assert [(await submit(batcher, (n, n)))[0][0] for n in (1, 2, 3)] == [2, 4, 6]
        both = await asyncio.gather(submit(batcher, (4,)), submit(batcher, (5,)))
        assert [one[0][0] for one in both] == [4, 5]
        assert not bulk.done()
        # As large as a batch of its own: it waits its turn.
        large = submit(batcher, *[(6, 6, 6, 6)] * 8)
        await asyncio.sleep(0.05)
        assert not large.done()
        engine.gate.set()
        assert len(await bulk) == 50
        assert len(await large) == 8

    run(engine, use)
    assert all(
        7 not in batch.input_ids for batch in engine.batches if set(map(int, batch.input_ids.flat)) & set(range(1, 6))
    )


def test_a_second_batch_runs_beside_a_first() -> None:
    """Once it would be half as large, and though it is of long requests; a third waits."""
    engine = FakeEngine(Ladder(Bucket(size, 4) for size in (1, 2, 3)), side_by_side=2)
    engine.held = lambda batch: 7 in batch.input_ids

    async def use(batcher: Batcher) -> None:
        hold(engine)
        first = submit(batcher, *[(7, 7, 7, 7)] * 3)
        await started(engine)
        small = submit(batcher, (1, 1, 1, 1))
        await asyncio.sleep(0.05)
        assert not small.done()
        second = submit(batcher, (2, 2, 2, 2))
        assert [one[0][0] for one in await asyncio.gather(small, second)] == [4, 8]
        assert not first.done()
        held = submit(batcher, *[(7, 7, 7, 7)] * 2)
        await asyncio.sleep(0.05)
        third = submit(batcher, *[(4, 4, 4, 4)] * 2)
        await asyncio.sleep(0.05)
        assert not third.done()
        engine.gate.set()
        await asyncio.gather(first, held, third)

    run(engine, use)
    assert [batch.rows for batch in engine.batches] == [3, 2, 2, 2]


def test_a_failure_beside_a_bulk_job_is_its_own() -> None:
    engine = FakeEngine(Ladder([Bucket(1, 4), Bucket(8, 4)]))
    engine.held = lambda batch: 7 in batch.input_ids

    async def use(batcher: Batcher) -> None:
        hold(engine)
        bulk = submit(batcher, *[(7, 7, 7, 7)] * 20)
        await started(engine)
        engine.failure = RuntimeError("broken")
        with pytest.raises(RuntimeError, match="broken"):
            await submit(batcher, (1,))
        engine.failure = None
        assert (await submit(batcher, (2,)))[0][0] == 2
        engine.gate.set()
        assert len(await bulk) == 20

    run(engine, use)


def test_a_bulk_job_is_not_starved_by_a_stream_of_single_queries() -> None:
    engine = FakeEngine(Ladder([Bucket(4, 4)]))

    async def use(batcher: Batcher) -> None:
        async def client() -> None:
            while not bulk.done():
                await submit(batcher, (9, 9, 9, 9))

        bulk = submit(batcher, *[(7, 7, 7, 7)] * 50)
        await asyncio.gather(bulk, *(client() for _ in range(32)))

    run(engine, use)
    # One of 33 requests that share the engine: about one row of each 33.
    assert len(order_of_first_ids(engine)) < 2 * 33 * 50


def test_two_bulk_jobs_share_the_engine() -> None:
    engine = FakeEngine(Ladder([Bucket(1, 4)]))

    async def use(batcher: Batcher) -> None:
        hold(engine)
        jobs = [submit(batcher, *[(n,) * 4] * 20) for n in (5, 6)]
        await started(engine)
        await settle()
        engine.gate.set()
        await asyncio.gather(*jobs)

    run(engine, use)
    order = order_of_first_ids(engine)
    assert abs(order[:20].count(5) - order[:20].count(6)) <= 4


def test_a_lower_priority_number_goes_first() -> None:
    engine = FakeEngine(Ladder([Bucket(1, 4)]))

    async def use(batcher: Batcher) -> None:
        first = await occupy(engine, batcher)
        jobs = [submit(batcher, (n,), priority=n) for n in (8, 3, 5)]
        await settle()
        engine.gate.set()
        await asyncio.gather(first, *jobs)

    run(engine, use)
    assert order_of_first_ids(engine) == [1, 3, 5, 8]


def test_the_observer_is_told_of_every_batch() -> None:
    told = []
    engine = FakeEngine(Ladder([Bucket(4, 4)]))

    async def main() -> None:
        batcher = Batcher(engine, max_queue_tokens=LIMIT, observer=lambda *batch: told.append(batch))
        await batcher.submit([encoding(1, 2), encoding(3)], dimensions=4, normalize=False)
        batcher.close()

    asyncio.run(main())
    assert [batch[:-1] for batch in told] == [(Bucket(4, 4), 2, 3, 16)]
