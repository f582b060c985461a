"""Requests in, batches out: a queue between the event loop and the device threads.

1. `submit` admits a request by queued tokens, or refuses it, and lets its rows wait.
2. A device thread that is free takes the most urgent rows, drops those whose client has gone, and has the ladder plan
   them into the batch that holds the most urgent one. It never waits while there is work and the device is idle:
   no timer, no poll. A batch is what queued up while the device was busy.
3. One batch more than the device runs is made ahead. While a batch of long requests runs, short requests do not wait
   for it: they run beside it, in small batches.
4. The engine runs the batch; rows go to their requests by the owner index that travels in it.
5. Every way out completes the request's future: result, error, cancellation, shutdown.

Which rows are the most urgent is `fair_queue`'s to say, and which batch runs when that of `turns`.

Knows neither HTTP nor JAX: the engine is a protocol, and a fake one tests every path.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jaxembed.buckets import Ladder
from jaxembed.packing import Row, pack
from jaxembed.types import Batch, Bucket, Column, Encoding
from jaxembed_server.errors import NotReadyError, QueueFullError
from jaxembed_server.fair_queue import FairQueue, Flow, Waiting
from jaxembed_server.turns import Taken, Turns

__all__ = ["DEVICE_THREAD", "Batcher", "Engine", "Observer"]

logger = logging.getLogger(__name__)

DEVICE_THREAD = "device-"
"""What their names begin with."""

FADING = 0.95
"""What is left of a batch's weight in the measured drain rate when the next one has run."""

LONGEST_WAIT = 60.0
"""Seconds that a refusal asks a client to wait at most: OpenAI's clients give up when it is over two minutes."""


class Engine(Protocol):
    """What the batcher needs of an engine."""

    ladder: Ladder
    side_by_side: int
    shares_cores: bool

    @property
    def dimension(self) -> int:
        """Columns of the result of `run`."""

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Float32 [n, dimension], one row for each real row of the batch; blocks."""

    def computed(self, batch: Batch) -> int:
        """Tokens that `run` computes, padding included."""


Observer = Callable[[Bucket, int, int, int, float], None]
"""Told of each batch: bucket, rows, real tokens, tokens computed, seconds."""


@dataclass(eq=False, kw_only=True)
class Job(Flow):
    """One request on its way.

    Attributes:
        missing: rows that have not come back yet.
    """

    dimensions: int
    normalize: bool
    result: npt.NDArray[np.float32]
    future: "asyncio.Future[npt.NDArray[np.float32]]"
    missing: int


class Batcher:
    """Batches for one engine. Made and used on one event loop; call `close` at the end.

    Args:
        engine: runs batches, called from threads of the batcher.
        max_queue_tokens: more than these are not let in. A request of any size is, when nothing waits.
        observer: told of each batch, in a device thread.
    """

    def __init__(self, engine: Engine, *, max_queue_tokens: int, observer: Observer = lambda *told: None) -> None:
        self._engine = engine
        self._max_queue_tokens = max_queue_tokens
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._lock = threading.RLock()
        # Two rooms to wait in: a thread that is woken in vain still takes the interpreter's lock from one that works.
        self._work_came = threading.Condition(self._lock)
        self._turn_came = threading.Condition(self._lock)
        # All below: only with `_lock` held.
        self._queue = FairQueue[Job](engine.ladder)
        self._queued_tokens = 0
        self._jobs: set[Job] = set()
        self._turns = Turns(self._queue, engine.side_by_side, shared=engine.shares_cores)
        self._run_tokens = 0.0
        self._run_seconds = 0.0
        self._draining = False
        self._closed = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._threads = [
            threading.Thread(target=self._work, name=f"{DEVICE_THREAD}{i}", daemon=True)
            for i in range(engine.side_by_side + 2)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def queued_tokens(self) -> int:
        """Tokens of all requests that are admitted and not yet answered."""
        with self._lock:
            return self._queued_tokens

    async def submit(
        self, encodings: Sequence[Encoding], *, dimensions: int, normalize: bool, priority: int = 0
    ) -> npt.NDArray[np.float32]:
        """Vectors of a request's rows.

        Cancelling drops the rows that have not been started.

        Args:
            encodings: n rows; each fits the ladder.
            dimensions: matryoshka size of all of them.
            normalize: L2-normalise them.
            priority: lower goes first.

        Returns:
            float32 [n, dimensions], in order.

        Raises:
            QueueFullError: too much is waiting.
            NotReadyError: the batcher is draining or closed.
            BucketError: a row is longer than the ladder.
            Exception: whatever the engine raised on one of the rows.
        """
        # Raises if the longest does not fit; no encodings fit everywhere.
        self._engine.ladder.fitting(max(map(len, encodings), default=0))
        job = Job(
            encodings=encodings,
            dimensions=dimensions,
            normalize=normalize,
            result=np.empty((len(encodings), dimensions), np.float32),
            future=self._loop.create_future(),
            missing=len(encodings),
        )
        if not encodings:
            return job.result
        self._admit(job, priority)
        try:
            return await job.future
        finally:
            self._leave(job)

    async def drain(self) -> None:
        """Take no more requests and wait for those that are in."""
        with self._lock:
            self._draining = True
        await self._idle.wait()

    def close(self) -> None:
        """Stop at once: what waits fails with NotReadyError, what runs is run to its end in its thread."""
        with self._lock:
            self._draining = self._closed = True
            jobs = list(self._jobs)
            self._work_came.notify_all()
        self._fail(jobs, NotReadyError("shutting down"))

    # On the event loop.

    def _admit(self, job: Job, priority: int) -> None:
        with self._lock:
            if self._draining:
                raise NotReadyError("shutting down")
            waiting = self._queued_tokens
            if waiting and waiting + job.tokens > self._max_queue_tokens:
                raise QueueFullError(waiting, self._max_queue_tokens, self._drain_seconds())
            self._queue.add(job, priority)
            self._queued_tokens += job.tokens
            self._jobs.add(job)
            self._idle.clear()
            self._wake()

    def _leave(self, job: Job) -> None:
        """The request is over, however it ended."""
        with self._lock:
            job.dead = True
            self._jobs.discard(job)
            self._queued_tokens -= job.tokens
            if not self._jobs:
                # Rows of cancelled requests may be all there is left.
                self._queue.clear()
                self._idle.set()

    # In the device threads.

    def _work(self) -> None:
        while self._work_once():
            pass

    def _work_once(self) -> bool:
        """Wait for a batch and run it. False when the batcher is closed.

        Its own function, so that a thread that waits refers to nothing of what it has run.
        """
        taken = self._take()
        if taken is None:
            return False
        rows = taken.rows
        try:
            batch = pack(
                taken.bucket,
                [Row(row.encoding, row.flow.dimensions, row.flow.normalize, i) for i, row in enumerate(rows)],
            )
            if not taken.beside and not self._await_turn(taken):
                return True
            start = time.perf_counter()
            try:
                vectors = self._engine.run(batch)
            finally:
                if not taken.beside:
                    self._end_turn(taken)
            seconds = time.perf_counter() - start
            self._measure(batch, seconds)
            self._deliver(batch, rows, vectors)
        except Exception as error:
            # Whatever went wrong, its callers must hear of it; the next batch is another matter.
            logger.exception("a batch of the bucket %s failed", taken.bucket)
            self._fail({row.flow for row in rows}, error)
        finally:
            with self._lock:
                if self._turns.over(taken):
                    self._turn_came.notify_all()
                self._wake()
        return True

    def _take(self) -> Taken[Job] | None:
        """The next batch's rows; waits for work. None when the batcher is closed."""
        with self._lock:
            while not self._closed:
                # The engine may have better shapes by now.
                self._queue.ladder = self._engine.ladder
                if (taken := self._turns.take(len(self._jobs))) is not None:
                    # What is left may fill a batch for another thread.
                    self._wake()
                    return taken
                self._work_came.wait()
            return None

    def _wake(self) -> None:
        """Wake a thread that is free, if it may find something to do."""
        if self._turns.wanted:
            self._work_came.notify()

    def _await_turn(self, taken: Taken[Job]) -> bool:
        """Wait until the engine is free and no batch under way is more urgent. False if the batch was given up."""
        with self._lock:
            # In the order of urgency; a semaphore would let the same thread in again and again.
            self._turn_came.wait_for(lambda: self._turns.may_run(taken))
            begun = self._turns.begin(taken, len(self._jobs))
            self._turn_came.notify_all()
            # Short requests that wait may run beside this one.
            self._wake()
            return begun

    def _end_turn(self, taken: Taken[Job]) -> None:
        with self._lock:
            self._turns.end(taken)
            self._turn_came.notify_all()

    def _deliver(self, batch: Batch, rows: Sequence[Waiting[Job]], vectors: npt.NDArray[np.float32]) -> None:
        if vectors.shape != (batch.rows, self._engine.dimension):
            raise ValueError(f"the engine returned {vectors.shape} for {batch.rows} rows of {self._engine.dimension}")
        finished = []
        for owner, vector in zip(batch.owners, vectors, strict=True):
            row = rows[owner]
            row.flow.result[row.item] = vector[: row.flow.dimensions]
        with self._lock:
            for row in rows:
                row.flow.missing -= 1
                if not row.flow.missing:
                    finished.append(row.flow)
        if finished:
            self._complete(finished, None)

    def _fail(self, jobs: Collection[Job], error: Exception) -> None:
        for job in jobs:
            job.dead = True
        self._complete(jobs, error)

    def _complete(self, jobs: Collection[Job], error: Exception | None) -> None:
        """Settle the futures of jobs on the event loop, but for those that are settled."""

        def settle() -> None:
            for job in jobs:
                if job.future.done():
                    continue
                if error is None:
                    job.future.set_result(job.result)
                else:
                    job.future.set_exception(error)

        try:
            # Once for all of them: each call wakes the loop, which then wants the interpreter's lock.
            self._loop.call_soon_threadsafe(settle)
        except RuntimeError:
            # The loop is closed: nobody is left to tell.
            logger.debug("a result came after the event loop had closed")

    def _measure(self, batch: Batch, seconds: float) -> None:
        tokens = int(batch.column(Column.LENGTH).sum())
        self._observer(batch.bucket, batch.rows, tokens, self._engine.computed(batch), seconds)
        with self._lock:
            # Tokens and seconds fade separately: their ratio is the rate, and a small batch counts as little as it is.
            self._run_tokens = FADING * self._run_tokens + tokens
            self._run_seconds = FADING * self._run_seconds + seconds

    def _drain_seconds(self) -> float:
        """How long what waits should take at the measured rate."""
        if not self._run_tokens:
            return 1.0
        return min(LONGEST_WAIT, self._queued_tokens * self._run_seconds / self._run_tokens)
