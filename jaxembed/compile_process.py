"""Shapes compiled into the cache by a process beside this one, from where `Engine.compile` loads them.

In a process that serves, a compilation takes the cores and the interpreter's lock from requests, and leaves memory that
is never given back whole (docs/performance.md). A process of its own runs at a low priority, and ends.
"""

import contextlib
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax

from jaxembed import cache
from jaxembed.buckets import Ladder
from jaxembed.checkpoint import Checkpoint
from jaxembed.engine import Engine
from jaxembed.executables import load_or_compile
from jaxembed.loading import load
from jaxembed.processes import python_command
from jaxembed.program import compile_shape
from jaxembed.sharding import make_mesh
from jaxembed.types import Bucket, Output
from jaxembed.warmup import use_cache

__all__ = ["compile_beside"]

logger = logging.getLogger(__name__)

NICENESS = 10
"""Of the process, more than of this one (nice(2)): where both want the cores, it gets a tenth."""


class Task(NamedTuple):
    """What the process is told.

    Attributes:
        checkpoint, dtype, max_length: of the model.
        output: what the executables give.
        buckets: the shapes.
        folder: of the cache.
    """

    checkpoint: Checkpoint
    dtype: str
    max_length: int
    output: Output
    buckets: Sequence[Bucket]
    folder: Path


def compile_beside(engine: Engine, ladder: Ladder) -> None:
    """Have the shapes of a ladder that the cache lacks compiled into it by a process beside this one; waits for it.

    Does nothing without a cache, and where the engine has another device than the CPU, which may let no second process
    in, or several. Whatever keeps a shape out of the cache, the engine then compiles it like any other.
    """
    kept, model = cache.current(), engine.model
    if kept is None or [(one.platform, one.id) for one in model.mesh.devices.flat] != [("cpu", 0)]:
        return
    missing = [bucket for bucket in ladder.buckets if not engine.cached(bucket)]
    if not missing:
        return
    task = Task(model.checkpoint, model.dtype, model.max_length, engine.output, missing, kept.folder)
    try:
        status = done(task)
    except OSError as error:
        logger.warning("a process that compiles cannot be started (%s); the shapes are compiled here", error)
        return
    if status:
        logger.warning("the process that compiles ended with %d; the shapes are compiled here", status)


def done(task: Task) -> int:
    """Have a task done; the exit status of the process that did it.

    Raises:
        OSError: it cannot be started.
    """
    told = pickle.dumps(task)
    process = subprocess.Popen(
        python_command(__name__),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        process_group=0,
    )
    assert process.stdin is not None
    # Its standard input stays open until it ends. Where this process ends first, it is closed, and that ends it too.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(told)
        process.stdin.flush()
    status = process.wait()
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return status


def main() -> int:
    """Do the task that stands in the standard input."""
    os.nice(NICENESS)
    task: Task = pickle.load(sys.stdin.buffer)
    threading.Thread(target=end_with_parent, daemon=True).start()
    use_cache(task.folder)
    mesh = make_mesh(jax.devices()[:1])
    model = load(task.checkpoint, dtype=task.dtype, max_length=task.max_length, mesh=mesh, abstract=True)
    # One at a time: XLA itself compiles in several threads, and two take a quarter more memory.
    for bucket in task.buckets:
        load_or_compile(cache.current(), model, task.output, bucket, partial(compile_shape, model, task.output, bucket))
    return 0


def end_with_parent() -> None:
    """Wait for the end of the standard input, and end."""
    # Not through Python's buffer, whose lock the end of the interpreter would miss.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    raise SystemExit(main())
