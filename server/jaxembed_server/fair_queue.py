"""Rows that wait, in the order in which they should run. Knows no threads, no futures, no engine.

Weighted fair queueing (Demers, Keshav & Shenker, 1989) with tokens for bytes and requests for flows: rows are ordered
by (priority, finish tag), so that a single query passes a bulk job and neither starves. Within a request the longest
rows go first: alike lengths share batches.
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

from jaxembed.buckets import Ladder
from jaxembed.types import Bucket, Encoding

__all__ = ["SHORT", "FairQueue", "Flow", "Waiting"]

WINDOW = 2
"""How many full batches of rows are looked at to plan one: more would pad less, overtake more and take longer."""
WINDOW_TOKENS = 4096
"""Where batches are small, so many tokens are."""

SHORT = 4
"""A request of at most a full batch over this is short: it may run beside another batch (`take_short`)."""


@dataclass(eq=False, kw_only=True)
class Flow:
    """One request, as far as the queue is concerned.

    Attributes:
        encodings: its rows.
        dead: nobody waits for it any more: its rows are dropped when they come up.
    """

    encodings: Sequence[Encoding]
    dead: bool = False

    @cached_property
    def tokens(self) -> int:
        """Of all rows."""
        return sum(map(len, self.encodings))


F = TypeVar("F", bound=Flow)


class Waiting(NamedTuple, Generic[F]):
    """A row that waits; compared by its first three fields, of which `ticket` is unique."""

    priority: int
    tag: float
    ticket: int
    flow: F
    item: int
    length: int

    @property
    def encoding(self) -> Encoding:
        """The row itself."""
        return self.flow.encodings[self.item]


class FairQueue(Generic[F]):
    """Waiting rows. Not safe for several threads at once: the owner holds a lock.

    Args:
        ladder: plans rows into batches.

    Attributes:
        ladder: as given; may be replaced at any time.
        tokens: of the rows that wait, those of dead flows included until they come up.
    """

    def __init__(self, ladder: Ladder) -> None:
        self.ladder = ladder
        # Rows of short requests and of long ones.
        self._short: list[Waiting[F]] = []
        self._long: list[Waiting[F]] = []
        self._tickets = itertools.count()
        # Virtual time: it goes by the tokens run over the number of flows that share the engine.
        self._clock = 0.0
        self.tokens = 0

    def __bool__(self) -> bool:
        return bool(self._short or self._long)

    @property
    def full(self) -> bool:
        """Whether the rows would fill a batch."""
        return self.tokens >= self.ladder.batch_tokens

    def add(self, flow: F, priority: int) -> None:
        """Let a flow's rows wait; a lower priority goes first."""
        lengths = [len(encoding) for encoding in flow.encodings]
        tag = self._clock
        for item in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
            tag += lengths[item]
            row = Waiting(priority, tag, next(self._tickets), flow, item, lengths[item])
            heapq.heappush(self._of(flow), row)
        self.tokens += flow.tokens

    def take(self) -> tuple[Bucket, list[Waiting[F]]] | None:
        """The next batch: the most urgent row and those that go best with it; None if nothing waits."""
        window: list[Waiting[F]] = []
        tokens = 0
        batches = max(WINDOW, WINDOW_TOKENS // self.ladder.batch_tokens)
        most, rows = batches * self.ladder.batch_tokens, batches * self.ladder.max_rows
        while self and tokens < most and len(window) < rows:
            row = heapq.heappop(self._most_urgent)
            self.tokens -= row.length
            if not row.flow.dead:
                window.append(row)
                tokens += row.length
        return self._planned(window)

    def short(self, flow: Flow) -> bool:
        """Whether a request is so small that running it beside a large batch costs that one little."""
        return flow.tokens * SHORT <= self.ladder.batch_tokens

    def take_short(self, room: int) -> tuple[Bucket, list[Waiting[F]]] | None:
        """The next batch of short requests alone, of so many tokens at most; None if there are none, or if a long one
        with a more urgent priority waits."""
        window: list[Waiting[F]] = []
        while self._short:
            row = self._short[0]
            behind = bool(self._long) and self._long[0].priority < row.priority
            if not row.flow.dead and (behind or row.length > room):
                break
            heapq.heappop(self._short)
            self.tokens -= row.length
            if not row.flow.dead:
                window.append(row)
                room -= row.length
        return self._planned(window)

    def _planned(self, window: list[Waiting[F]]) -> tuple[Bucket, list[Waiting[F]]] | None:
        """The batch with the first of these rows; the rows that are not in it wait again."""
        if not window:
            return None
        plan = self.ladder.first_batch([row.length for row in window])
        chosen = set(plan.items)
        self.give_back(row for i, row in enumerate(window) if i not in chosen)
        return plan.bucket, [window[i] for i in plan.items]

    def give_back(self, rows: Iterable[Waiting[F]]) -> None:
        """Let rows wait again in their old places."""
        for row in rows:
            if not row.flow.dead:
                heapq.heappush(self._of(row.flow), row)
                self.tokens += row.length

    def outranks(self, row: Waiting[F]) -> bool:
        """Whether a row that waits is more urgent than this one."""
        if not self:
            return False
        first = self._most_urgent[0]
        return first < row and not first.flow.dead

    def ran(self, rows: Sequence[Waiting[F]], flows: int) -> None:
        """Move virtual time on: these rows are being run while so many flows share the engine."""
        self._clock += sum(row.length for row in rows) / max(1, flows)

    def clear(self) -> None:
        """Forget all rows."""
        self._short.clear()
        self._long.clear()
        self.tokens = 0

    def _of(self, flow: Flow) -> list[Waiting[F]]:
        """The heap that a flow's rows wait in."""
        return self._short if self.short(flow) else self._long

    @property
    def _most_urgent(self) -> list[Waiting[F]]:
        """The heap with the most urgent row; one of them is not empty."""
        if not self._short or not self._long:
            return self._short or self._long
        return min(self._short, self._long, key=lambda heap: heap[0])
