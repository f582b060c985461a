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
        while tokens < most and len(window) < rows and (heap := self._most_urgent):
            window.append(row := self._pop(heap))
            tokens += row.length
        return self._planned(window)

    def short(self, flow: Flow) -> bool:
        """Whether a request is so small that running it beside a large batch costs that one little."""
        return flow.tokens * SHORT <= self.ladder.batch_tokens

    def take_short(self, room: int) -> tuple[Bucket, list[Waiting[F]]] | None:
        """The next batch of short requests alone, of so many tokens at most; None if there are none, or if a long one
        with a more urgent priority waits."""
        window: list[Waiting[F]] = []
        long = self._first(self._long)
        while (row := self._first(self._short)) is not None and row.length <= room:
            if long is not None and long.priority < row.priority:
                break
            window.append(self._pop(self._short))
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
        heap = self._most_urgent
        return bool(heap) and heap[0] < row

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

    def _pop(self, heap: list[Waiting[F]]) -> Waiting[F]:
        """Take the first row of a heap."""
        row = heapq.heappop(heap)
        self.tokens -= row.length
        return row

    def _first(self, heap: list[Waiting[F]]) -> Waiting[F] | None:
        """The first row of a heap that somebody waits for; those of dead flows before it are dropped."""
        while heap and heap[0].flow.dead:
            self._pop(heap)
        return heap[0] if heap else None

    @property
    def _most_urgent(self) -> list[Waiting[F]]:
        """The heap that begins with the most urgent row that somebody waits for; an empty one if nobody does."""
        short, long = self._first(self._short), self._first(self._long)
        return self._long if short is None or (long is not None and long < short) else self._short
