"""One compiled executable a Bucket: Batch -> array. Knows no text, no disk, no asyncio.

What is compiled is in `program`; weights are arguments of it, so executables can be cached and a call passes a flat
tuple. A shape that was not compiled ahead is an error, never a compilation on the way.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import jax
import numpy as np
import numpy.typing as npt

from jaxembed import cache, cpu_library
from jaxembed.buckets import Ladder
from jaxembed.cost import ACCELERATOR_PRICES, Cost
from jaxembed.errors import BucketError
from jaxembed.executables import facts, has, load_or_compile
from jaxembed.kernel_choice import kernels_on
from jaxembed.locks import SharedLock
from jaxembed.model import Model
from jaxembed.packing import empty, full
from jaxembed.program import compile_shape
from jaxembed.sharding import DATA, platform
from jaxembed.types import Batch, Bucket, Column, Output

__all__ = ["MAX_BATCH_TOKENS", "Compiled", "Engine"]

MAX_BATCH_TOKENS = {"cpu": 512}
"""Tokens a dispatch should hold per device, by platform (docs/performance.md)."""
OTHER_BATCH_TOKENS = 16_384
"""On others; measured on a GPU, a guess for TPU."""

LENGTH_MULTIPLE = {"tpu": 16}
"""By platform: lengths that are chosen are multiples of so many tokens, of which a tile in bfloat16 holds so many."""

GPU_RUNS = SharedLock()
"""Held by each run on this process's GPUs: shared, but alone by the first one of an executable. In it cuDNN tries its
attention while it records the stream on which all executables run: what another thread starts there meanwhile fails, or
is recorded and not run (docs/numerics.md)."""

LADDERS = "ladders"
"""What they are called in the cache."""


@dataclass(frozen=True)
class Compiled:
    """How the compilation of one bucket went.

    Attributes:
        bucket: the shape.
        seconds: wall time of lowering, compiling and one trial run.
        cached: whether the executable came from the cache, or was there already.
    """

    bucket: Bucket
    seconds: float
    cached: bool


class Engine:
    """The executables of one model on one mesh.

    Args:
        model: what is compiled.
        ladder: the shapes there may be; by default `Ladder.default` for the model's length and the platform.
        max_batch_tokens: for the default ladder: tokens per dispatch and device.
        output: what the executables give of each row.

    Attributes:
        side_by_side: batches that run at a time, each called from a thread of its own. On CPU one computes while the
            other's threads wait for each other (docs/performance.md); elsewhere one waits on the device while the other
            runs. Where several devices share a CPU, one at a time, whoever calls.
        length_multiple: lengths of shapes that are chosen had better be multiples of it.
        flat: shapes of several rows had better be flat (`types.Bucket`), as on CPU, where that was measured
            (docs/performance.md).
        counted: flat shapes compute the tokens that there are, not those that there is room for.
        shares_cores: batches that run at a time take the cores from one another, and from whatever is started beside
            them, as on CPU; elsewhere they run one after the other.
    """

    def __init__(
        self,
        model: Model,
        ladder: Ladder | None = None,
        *,
        max_batch_tokens: int | None = None,
        output: Output = Output.DENSE,
    ) -> None:
        self.model = model
        self.output = output
        self.platform = platform(model.mesh)
        devices = model.mesh.shape[DATA]
        if max_batch_tokens is None:
            max_batch_tokens = MAX_BATCH_TOKENS.get(self.platform, OTHER_BATCH_TOKENS)
        self.batch_multiple = devices
        self.length_multiple = LENGTH_MULTIPLE.get(self.platform, 1)
        self.max_batch_tokens = max_batch_tokens * devices
        # A ladder holds its executables, and nothing else does: with the last who plans by it, they go. Changed only
        # with the lock held.
        self._lock = threading.Lock()
        self._held: WeakKeyDictionary[Ladder, dict[Bucket, Any]] = WeakKeyDictionary()
        self._executables: WeakValueDictionary[Bucket, Any] = WeakValueDictionary()
        self._compiling: dict[Bucket, threading.Lock] = {}
        self.flat = self.platform == "cpu" and devices == 1
        self.counted = self.flat and kernels_on(model.mesh, model.dtype).cpu_tokens >= self.max_batch_tokens
        self.ladder = ladder or Ladder.default(
            max_length=model.max_length,
            max_batch_tokens=self.max_batch_tokens,
            batch_multiple=devices,
            flat=self.flat,
            counted=self.counted,
        )
        self.allow(self.ladder)
        self.shares_cores = self.platform == "cpu"
        several = model.mesh.size > 1
        self.side_by_side = 1 if several and self.shares_cores else 2
        # Devices that wait for one another must all get their batches in the same order; and on CPU, where they share
        # their threads, one batch at a time.
        self._order: AbstractContextManager[object] = threading.Lock() if several else nullcontext()
        self._shared: Callable[[], AbstractContextManager[object]] = nullcontext
        self._alone: Callable[[], AbstractContextManager[object]] = nullcontext
        if self.platform == "gpu":
            self._shared, self._alone = GPU_RUNS.shared, GPU_RUNS.alone
        elif self.platform == "cpu":
            self._shared = cpu_library.running

    @property
    def dimension(self) -> int:
        """Width of the array that `run` returns."""
        return self.model.dimension

    @property
    def compiled(self) -> frozenset[Bucket]:
        """The buckets that are ready."""
        return frozenset(self._executables.keys())

    def allow(self, ladder: Ladder) -> None:
        """Let the shapes of another ladder be compiled; `ladder` stays what it is until `adopt`.

        They are kept for as long as somebody refers to that ladder object.

        Raises:
            BucketError: a batch size does not divide over the devices.
        """
        several = self.batch_multiple > 1
        bad = [one for one in ladder.buckets if one.batch_size % self.batch_multiple or (several and one.flat)]
        if bad:
            raise BucketError(f"the bucket {bad[0]} does not divide over {self.batch_multiple} devices")
        if self.platform != "cpu":
            ladder.prices = ACCELERATOR_PRICES._replace(call=ACCELERATOR_PRICES.call * self.batch_multiple)
        with self._lock:
            held = self._held.setdefault(ladder, {})
            for bucket in ladder.buckets:
                self._compiling.setdefault(bucket, threading.Lock())
                executable = self._executables.get(bucket)
                if executable is not None:
                    held[bucket] = executable

    def adopt(self, ladder: Ladder) -> None:
        """Plan by another ladder from now on.

        Batches that were planned by the old one still run, if whoever planned them has kept a reference to it; once
        nobody refers to it, executables that only it needs are dropped.

        Raises:
            BucketError: a shape of it is not compiled.
        """
        self.allow(ladder)
        missing = [bucket for bucket in ladder.buckets if bucket not in self._held[ladder]]
        if missing:
            raise self._unknown(missing[0])
        self.ladder = ladder

    def cached(self, bucket: Bucket) -> bool:
        """Whether `compile` would find this shape in the cache."""
        return has(cache.current(), self.model, self.output, bucket)

    def keep(self, ladder: Ladder) -> None:
        """Keep a ladder in the cache, if there is one, for the next start with the same model and settings."""
        kept = cache.current()
        if kept is not None:
            content = json.dumps({"buckets": ladder.buckets, "prices": ladder.prices})
            kept.write(LADDERS, self._ladder_key(kept), content.encode())

    def kept(self) -> Ladder | None:
        """The ladder of the last `keep`; None if there is none. Its shapes need not be compiled."""
        kept = cache.current()
        content = None if kept is None else kept.read(LADDERS, self._ladder_key(kept))
        if content is None:
            return None
        told = json.loads(content)
        return Ladder((Bucket(*sizes) for sizes in told["buckets"]), Cost(*told["prices"]))

    def _ladder_key(self, kept: cache.Cache) -> str:
        return kept.key(*facts(self.model, self.output), self.max_batch_tokens, self.batch_multiple)

    def computed(self, batch: Batch) -> int:
        """Tokens that are computed for a batch, padding included."""
        bucket = batch.bucket
        return int(batch.column(Column.TOKENS).sum()) if self.counted and bucket.flat else bucket.tokens

    def time(self, bucket: Bucket, *, filled: bool = True) -> float:
        """Seconds that one batch of this shape takes, a full one or an empty one; it must be compiled."""
        batch = full(bucket) if filled else empty(bucket)
        start = time.perf_counter()
        self.run(batch)
        return time.perf_counter() - start

    def compile(self, bucket: Bucket) -> Compiled:
        """Compile one bucket and run it once on padding; does nothing if it is ready. Safe from several threads.

        Raises:
            BucketError: the ladder does not hold this shape.
            Exception: whatever XLA raises when it cannot compile.
        """
        start = time.perf_counter()
        cached = True
        if bucket in self._executables:
            return Compiled(bucket, time.perf_counter() - start, cached)
        if not self._allowed(bucket):
            raise self._unknown(bucket)
        with self._compiling[bucket]:
            if bucket not in self._executables:
                executable, cached = load_or_compile(
                    cache.current(),
                    self.model,
                    self.output,
                    bucket,
                    lambda: compile_shape(self.model, self.output, bucket),
                )
                # The first run of an executable allocates and is slow: it happens here, not on a request.
                with self._alone():
                    jax.block_until_ready(executable(self.model.leaves, empty(bucket).table))
                with self._lock:
                    self._executables[bucket] = executable
                    for ladder, held in self._held.items():
                        if bucket in ladder.buckets:
                            held[bucket] = executable
        return Compiled(bucket, time.perf_counter() - start, cached)

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Run a batch and wait for it. Safe from several threads.

        Returns:
            float32 [n, ...], the real rows in the batch's order, of the shape that `Output` says; features behind a
            row's `dimensions` are 0.

        Raises:
            BucketError: the batch's shape was not compiled.
        """
        executable = self._executables.get(batch.bucket)
        if executable is None:
            raise self._unknown(batch.bucket)
        with self._shared():
            with self._order:
                result: jax.Array = executable(self.model.leaves, batch.table)
                if self.side_by_side == 1:
                    result.block_until_ready()
            # Until it is there: it may be started only after the call has returned.
            rows = np.asarray(result)
        return rows[: batch.rows]

    def _unknown(self, bucket: Bucket) -> BucketError:
        if self._allowed(bucket):
            return BucketError(f"the bucket {bucket} is on the ladder but was not compiled: run the warm-up first")
        return BucketError(f"the bucket {bucket} is not on the ladder {self.ladder}")

    def _allowed(self, bucket: Bucket) -> bool:
        with self._lock:
            return any(bucket in ladder.buckets for ladder in self._held)
