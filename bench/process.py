"""The bench's side of workers/worker.py: starts an engine under its own Python, asks it, keeps it asleep between."""

import base64
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["WORKERS", "Worker", "end", "environment", "fall_with_parent", "group_usage", "resident"]

WORKERS = Path(__file__).resolve().parent / "workers"
LIMIT = 900.0
"""Seconds that one answer may take."""


class Worker:
    """One engine in its own process; use it in a `with closing(...)`.

    It is stopped whenever it is not asked: thread pools that spin for a while would take the others' time.

    Args:
        python: of the environment that has the engine.
        module: of `workers`.
        options: what the module's `make` takes.
        foreign: whether the environment is a peer's, which must find nothing of ours on its path.

    Attributes:
        cold: seconds from the first import to the first vector.
        note: what the engine says about itself.
        versions: of its packages.

    Raises:
        RuntimeError: it ended before its first vector; the message has the last line that it wrote.
    """

    def __init__(self, python: str, module: str, options: Mapping[str, Any], *, foreign: bool) -> None:
        self._log = tempfile.TemporaryFile()
        line = [python, str(WORKERS / "worker.py"), module, json.dumps(options)]
        self._process = subprocess.Popen(
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment(foreign=foreign),
            start_new_session=True,
            preexec_fn=fall_with_parent,
        )
        try:
            hello = self._read()
        except BaseException:
            self.close()
            raise
        self.cold: float = hello["cold"]
        self.note: str = hello["note"]
        self.versions: dict[str, str] = hello["versions"]

    def close(self) -> None:
        """End the process in every case."""
        end(self._process)
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()

    @property
    def resident(self) -> float:
        """Memory in MB."""
        return resident(self._process.pid)

    def load(self, sets: Mapping[str, Sequence[str]]) -> None:
        """Hand over the texts; every shape is compiled and run once."""
        self.ask("load", sets={name: list(texts) for name, texts in sets.items()})

    def vectors(self, of: str, first: int | None = None) -> npt.NDArray[np.float32]:
        """float32 [n, D] of a set, or of its first texts."""
        width, rows = self.ask("vectors", of=of, first=first)
        return np.frombuffer(base64.b64decode(rows), "<f4").reshape(-1, width)

    def ask(self, kind: str, **options: Any) -> Any:
        """The answer to one of the questions of `worker.Session`.

        Raises:
            RuntimeError: the process ended in its place, or was ended for taking too long.
        """
        assert self._process.stdin is not None
        os.killpg(self._process.pid, signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps([kind, options]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # What it wrote before it ended says more than the pipe.
            pass
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        watch = threading.Timer(LIMIT, self._process.kill)
        watch.start()
        line = self._process.stdout.readline()
        watch.cancel()
        if not line:
            self._process.wait()
            self._log.seek(0)
            said = self._log.read().decode(errors="replace").strip().splitlines() or ["nothing was said"]
            raise RuntimeError(said[-1])
        os.killpg(self._process.pid, signal.SIGSTOP)
        return json.loads(line)


def fall_with_parent() -> None:
    """Run by a child before its program: it is killed when the benchmark is, which a stopped process would not see."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def environment(*, foreign: bool) -> dict[str, str]:
    """The variables of a process that is measured: no hub, nothing of ours on a peer's path, a GPU for all of them."""
    kept = {name: value for name, value in os.environ.items() if not (foreign and name == "PYTHONPATH")}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
        # JAX would take three quarters of a GPU's memory at once.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def end(process: "subprocess.Popen[bytes]", patience: float = 0.0) -> None:
    """End a process that leads its own group, and the group with it; stopped ones too.

    Args:
        process: started with `start_new_session`.
        patience: seconds that it has to end by itself.
    """
    try:
        os.killpg(process.pid, signal.SIGCONT)
        if patience:
            process.terminate()
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                pass
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def group_usage(group: int) -> tuple[float, float]:
    """(CPU seconds used so far, memory in MB) of all processes of a group together; NaN where there is no /proc."""
    if not Path("/proc/self/stat").is_file():
        return float("nan"), float("nan")
    used, memory = 0, 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            # It ended meanwhile.
            continue
        if int(fields[2]) == group:
            used += int(fields[11]) + int(fields[12])
            memory += resident(int(stat.parent.name))
    return used / os.sysconf("SC_CLK_TCK"), memory


def resident(pid: int) -> float:
    """Memory of a process in MB; NaN where there is no /proc."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), float("nan"))
