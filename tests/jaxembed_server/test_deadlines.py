"""Many deadlines by one timer: who is told, when, and what becomes of a cancellation."""

import asyncio
from typing import Any

import pytest

from jaxembed_server.deadlines import Deadlines


class Waits:
    """Notes when it was late, by the loop's clock."""

    def __init__(self) -> None:
        self.told: list[float] = []

    def late(self) -> None:
        self.told.append(asyncio.get_running_loop().time())


class Timers:
    """Counts the timers that a loop is asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        loop = asyncio.get_running_loop()
        call_at = loop.call_at

        def counted(*args: Any, **others: Any) -> asyncio.TimerHandle:
            self.count += 1
            return call_at(*args, **others)

        monkeypatch.setattr(loop, "call_at", counted)


def test_each_is_late_in_its_time_and_only_if_it_has_not_ended() -> None:
    async def main() -> None:
        loop, deadlines = asyncio.get_running_loop(), Deadlines(0.05)
        first, ends, second = Waits(), Waits(), Waits()
        began = loop.time()
        deadlines.begin(first)
        deadlines.begin(ends)
        await asyncio.sleep(0.02)
        later = loop.time()
        deadlines.begin(second)
        deadlines.end(ends)
        await asyncio.sleep(0.1)
        assert ends.told == []
        assert len(first.told) == len(second.told) == 1
        assert first.told[0] >= began + 0.05 - 1e-3
        assert second.told[0] >= later + 0.05 - 1e-3
        # One that has been told may end as any other.
        deadlines.end(first)

    asyncio.run(main())


def test_one_timer_serves_all_and_none_is_set_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        deadlines = Deadlines(0.02)
        timers = Timers(monkeypatch)
        for _ in range(100):
            waits = Waits()
            deadlines.begin(waits)
            deadlines.end(waits)
        assert timers.count == 1
        await asyncio.sleep(0.05)
        timers.count = 0
        late = Waits()
        deadlines.begin(late)
        assert timers.count == 1
        await asyncio.sleep(0.05)
        assert len(late.told) == 1

    asyncio.run(main())


def test_a_loop_after_the_first_has_a_timer_of_its_own() -> None:
    deadlines, waits = Deadlines(0.01), Waits()

    async def in_time() -> None:
        deadlines.begin(waits)
        deadlines.end(waits)

    async def too_long() -> None:
        deadlines.begin(waits)
        await asyncio.sleep(0.05)

    asyncio.run(in_time())
    asyncio.run(too_long())
    assert len(waits.told) == 1


def test_a_timeout_ends_what_takes_too_long_and_nothing_else() -> None:
    async def main() -> None:
        deadlines = Deadlines(0.02)
        with deadlines.timeout():
            await asyncio.sleep(0)
        with pytest.raises(TimeoutError), deadlines.timeout():
            await asyncio.sleep(10)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        with pytest.raises(ValueError, match="mine"), deadlines.timeout():
            raise ValueError("mine")
        # Nobody is told of it once it has ended.
        await asyncio.sleep(0.05)

    asyncio.run(main())


def test_a_task_that_others_cancel_in_time_is_cancelled() -> None:
    async def main() -> None:
        async def waits() -> None:
            with Deadlines(10).timeout():
                await asyncio.sleep(10)

        task = asyncio.ensure_future(waits())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_a_task_that_others_cancel_too_is_cancelled_though_it_was_late() -> None:
    async def main() -> None:
        async def waits() -> None:
            with Deadlines(0.01).timeout():
                try:
                    await asyncio.sleep(10)
                finally:
                    # The cancellation for being late is on its way out.
                    task.cancel()

        task = asyncio.ensure_future(waits())
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
