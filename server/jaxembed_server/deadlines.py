"""What is to happen once something takes too long: one timer of the event loop for all that has equally long.

`asyncio.timeout` makes a timer each, which costs a short text more than to decode its body (docs/performance.md). Knows
neither HTTP nor the model.
"""

import asyncio
from typing import Protocol, Self

__all__ = ["Deadlines", "Interruption", "Late"]


class Late(Protocol):
    """Something that may take too long."""

    def late(self) -> None:
        """It does: called once, on the event loop."""


class Deadlines:
    """Tells what has begun and not ended within so many seconds.

    What has equally long is late in the order in which it began: a timer for the first does for all. It stays set when
    that one ends in time, as nearly all do, and is set again for what is the first by then.

    Args:
        seconds: until something is late.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._open: dict[Late, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def begin(self, what: Late) -> None:
        """From now on."""
        loop = asyncio.get_running_loop()
        self._open[what] = loop.time() + self._seconds
        if self._timer is None or self._loop is not loop:
            self._set(loop)

    def end(self, what: Late) -> None:
        """In time or not, it is over."""
        self._open.pop(what, None)

    def timeout(self) -> "Timeout":
        """As `asyncio.timeout` of so many seconds, for a `with` on the event loop."""
        return Timeout(self)

    def _set(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer = loop.call_at(next(iter(self._open.values())), self._ring)

    def _ring(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        over = []
        for what, by in self._open.items():
            if by > now:
                break
            over.append(what)
        for what in over:
            del self._open[what]
        if self._open:
            self._set(loop)
        for what in over:
            what.late()


class Interruption:
    """Cancels, from without, what a task does inside it, and then ends that cancellation.

    Args:
        deadlines: begins and ends with it.
    """

    __slots__ = ("_cancelling", "_deadlines", "_task", "cancelled")

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self.cancelled = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._deadlines.begin(self)
        return self

    def late(self) -> None:
        """It takes too long."""
        self.cancel()

    def cancel(self) -> None:
        """Now."""
        self.cancelled = True
        self._task.cancel()

    def ended(self, error: BaseException | None) -> bool:
        """At its end: whether an error is this cancellation. Others may have cancelled the task too: that goes on."""
        self._deadlines.end(self)
        ours = self.cancelled and self._task.uncancel() <= self._cancelling
        return ours and isinstance(error, asyncio.CancelledError)


class Timeout(Interruption):
    """Cancels what its task does inside it once it is late, and has that end as a TimeoutError.

    Raises:
        TimeoutError: at its end, if it was late and nobody else cancelled the task.
    """

    __slots__ = ()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.ended(error):
            raise TimeoutError from error
