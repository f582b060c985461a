"""Which batches are made and run, and when. Knows no threads, no futures, no engine.

Ordinary batches wait for their turns: the engine runs so many of them at a time, and one more is made ahead, if there
are rows for a full one: a smaller one might still grow. Batches of short requests alone may run beside them, at once.
Where all of them share cores, such a batch waits for each operation of two long ones, and for hardly any of a single
one: so as long as short requests come, long batches run one at a time. So do outsize ones, for the sake of memory.
"""

from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from jaxembed.buckets import Ladder
from jaxembed.types import Bucket
from jaxembed_server.fair_queue import SHORT, FairQueue, Flow, Waiting

__all__ = ["CALM", "Taken", "Turns"]

F = TypeVar("F", bound=Flow)

CALM = 16
"""After so many long batches without a short request, they no longer run one at a time for the sake of the next one."""


class Taken(NamedTuple, Generic[F]):
    """A batch to be.

    Attributes:
        bucket: its shape.
        rows: what goes into it.
        beside: it is of short requests and runs at once, beside another batch.
        long: it has rows of a long request.
        tokens: of its rows.
        ladder: what it was planned by; the engine keeps its shapes while it is referred to.
    """

    bucket: Bucket
    rows: Sequence[Waiting[F]]
    beside: bool
    long: bool
    tokens: int
    ladder: Ladder

    @property
    def first(self) -> Waiting[F]:
        """Its most urgent row."""
        return min(self.rows)

    @property
    def outsize(self) -> bool:
        """Whether it is of a single very long row (`Ladder.outsize`)."""
        return self.ladder.outsize(self.bucket)


class Turns(Generic[F]):
    """The batches that are under way. Not safe for several threads at once: the owner holds a lock.

    Args:
        queue: the rows that wait.
        at_a_time: ordinary batches that the engine runs.
        shared: they share cores, rather than wait for one another on a device.
    """

    def __init__(self, queue: FairQueue[F], at_a_time: int, *, shared: bool) -> None:
        self._queue = queue
        self._at_a_time = at_a_time
        self._shared = shared
        # Long batches until no more short requests are reckoned with.
        self._reckoned = 0
        # Ordinary batches from `take` to `over`, and those of them that have not begun to run.
        self._ordinary = 0
        self._coming: list[Taken[F]] = []
        self._running: list[Taken[F]] = []
        self._beside: list[Taken[F]] = []

    @property
    def wanted(self) -> bool:
        """Whether a free thread may find a batch to make."""
        return bool(self._queue) and (self._ordinary_wanted or self._room_beside > 0)

    def take(self, flows: int) -> Taken[F] | None:
        """A batch that a free thread should make now; None if it should wait. It is under way until it is `over`.

        Args:
            flows: how many share the engine, for `FairQueue.ran`.
        """
        if (room := self._room_beside) and (short := self._queue.take_short(room)) is not None:
            self._queue.ran(short[1], flows)
            taken = self._made(*short, beside=True)
            self._beside.append(taken)
            return taken
        if self._ordinary_wanted and (most := self._queue.take()) is not None:
            taken = self._made(*most, beside=False)
            self._ordinary += 1
            self._coming.append(taken)
            return taken
        return None

    def may_run(self, taken: Taken[F]) -> bool:
        """Whether it is the turn of an ordinary batch that is ready.

        The engine is free, and will be for those that are more urgent and have not begun, ready or not. A device takes
        one batch after the other: there none may be more urgent.
        """
        if len(self._running) >= self._allowed(self._running) or (self._shared and self._running and taken.outsize):
            return False
        ahead = sum(one.first < taken.first for one in self._coming)
        with_it = [*self._running, taken]
        return not ahead or (self._shared and len(with_it) + ahead <= self._allowed(with_it))

    def begin(self, taken: Taken[F], flows: int) -> bool:
        """Let a batch run whose turn it is.

        Returns:
            False if it is given up: by now something more urgent waits, or all its clients have gone. Its rows wait
            again.
        """
        self._gone(taken)
        if self._queue.outranks(taken.first) or all(row.flow.dead for row in taken.rows):
            self._queue.give_back(taken.rows)
            return False
        self._running.append(taken)
        self._reckoned = max(0, self._reckoned - taken.long)
        self._queue.ran(taken.rows, flows)
        return True

    def end(self, taken: Taken[F]) -> None:
        """The engine is done with an ordinary batch."""
        self._running.remove(taken)

    def over(self, taken: Taken[F]) -> bool:
        """All is done with a batch, whatever came of it.

        Returns:
            True if it could not be made, so that it never began, and others may have waited for it to.
        """
        if taken.beside:
            self._beside.remove(taken)
            return False
        self._ordinary -= 1
        return self._gone(taken)

    def _gone(self, taken: Taken[F]) -> bool:
        """A batch is no longer one that will begin, if it was. Its rows may be in another one by now."""
        before = len(self._coming)
        self._coming = [one for one in self._coming if one is not taken]
        return len(self._coming) < before

    def _allowed(self, running: Sequence[Taken[F]]) -> int:
        """Ordinary batches that may run at a time, if these do."""
        alone = (self._reckoned and any(one.long for one in running)) or any(one.outsize for one in running)
        return 1 if self._shared and alone else self._at_a_time

    @property
    def _ordinary_wanted(self) -> bool:
        """Whether a batch should be made that waits for its turn: the first, or one ahead if it would be full.

        Where batches share cores, a part of which a single one leaves idle, also the one that may run beside the first,
        once it would be half as large: sooner, it would be of a row or two.
        """
        if not self._ordinary:
            # Beside a batch that is left over from before, one of a row or two would not pay either.
            return self._half_of(self._beside)
        allowed = self._allowed(self._running)
        second = bool(self._shared and self._running and not self._beside and self._ordinary < allowed)
        return (second and self._half_of(self._running)) or (self._queue.full and self._ordinary <= allowed)

    @property
    def _room_beside(self) -> int:
        """Tokens of short requests that may start at once, beside a long batch that runs or will; 0 if none does."""
        long = any(one.long for one in (*self._running, *self._coming))
        return self._queue.ladder.batch_tokens // SHORT if long else 0

    def _half_of(self, batches: Iterable[Taken[F]]) -> bool:
        """Whether a batch of what waits would be at least half as large as these together."""
        return self._queue.tokens * 2 >= sum(one.tokens for one in batches)

    def _made(self, bucket: Bucket, rows: Sequence[Waiting[F]], *, beside: bool) -> Taken[F]:
        short = [self._queue.short(row.flow) for row in rows]
        if any(short):
            self._reckoned = CALM
        long = not all(short)
        return Taken(bucket, rows, beside, long, sum(row.length for row in rows), self._queue.ladder)
