"""The engines in a process of their own, which sleeps on a pipe while the server is measured."""

import contextlib
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.engines import OURS, REFERENCE, Engine, make

__all__ = ["Worker"]

LIST = 32


class Worker:
    """A child process with our engine and sentence-transformers; use it in a `with`.

    Args:
        model: folder or hub id.
        dtype: of our engine: "float32" or "bfloat16".
        queries, mixed: the texts to measure with.

    Attributes:
        engines: names of those that run.
        absent: name -> why it does not run.
        reference: whose vectors `embed` returns: sentence-transformers' if it runs, else ours.
        device: what the vectors are computed on.
    """

    def __init__(self, model: str, dtype: str, queries: Sequence[str], mixed: Sequence[str]) -> None:
        # A fork would copy the parent's threads' locks; a new process imports everything for itself.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, model, dtype, queries, mixed), daemon=True)
        self._process.start()
        theirs.close()
        self.engines: list[str]
        self.absent: dict[str, str]
        self.engines, self.absent, self.device = self._pipe.recv()
        self.reference = REFERENCE if REFERENCE in self.engines else self.engines[0]

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Asked first: a child that is merely killed leaves semaphores behind.
        with contextlib.suppress(OSError):
            self._pipe.send(None)
        self._process.join(10)
        self._process.terminate()

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Vectors of the reference."""
        return self._ask("embed", self.reference, texts)

    def measure(self, engine: str, load: str, seconds: float) -> float:
        """Texts per second in calls of 32; for one query at a time the median milliseconds."""
        return self._ask("measure", engine, load, seconds)

    def _ask(self, *question: Any) -> Any:
        self._pipe.send(question)
        return self._pipe.recv()


def work(pipe: Connection, model: str, dtype: str, queries: Sequence[str], mixed: Sequence[str]) -> None:
    """Make the engines, then answer questions; what the child process runs."""
    import jax

    engines: dict[str, Engine] = {}
    absent: dict[str, str] = {}
    for name in (OURS[dtype == "bfloat16"], REFERENCE):
        made = make(name, model)
        if isinstance(made, str):
            absent[name] = made
        else:
            engines[name] = made
    calls = {
        "one query at a time": [[text] for text in queries],
        "short queries": [queries[i : i + LIST] for i in range(0, len(queries), LIST)],
        "mixed texts, float": [mixed[i : i + LIST] for i in range(0, len(mixed), LIST)],
    }
    for engine in engines.values():
        for texts in calls.values():
            engine.encode(texts[0])
    pipe.send((list(engines), absent, f"{jax.default_backend()} ({jax.devices()[0].device_kind})"))
    while question := pipe.recv():
        kind, name, *rest = question
        engine = engines[name]
        pipe.send(engine.encode(*rest) if kind == "embed" else measure(engine, calls[rest[0]], rest[1]))


def measure(engine: Engine, calls: Sequence[Sequence[str]], seconds: float) -> float:
    """See `Worker.measure`."""
    taken, texts = [], 0
    start = time.perf_counter()
    for call in itertools.cycle(calls):
        before = time.perf_counter()
        engine.encode(call)
        after = time.perf_counter()
        taken.append(after - before)
        texts += len(call)
        if after - start > seconds:
            break
    return statistics.median(taken) * 1e3 if len(calls[0]) == 1 else texts / (after - start)
