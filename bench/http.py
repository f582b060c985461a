"""The server as its users meet it, beside the engines in process: `python -m bench.http`. README.md explains.

1. A worker process makes the engines; it sleeps while the server is measured, and the server while the worker is.
2. The server is started by its command line; GET /ready says when it serves.
3. Answers are compared with sentence-transformers' vectors, under the same load that is measured.
4. Each repeat measures, in turns: one query at a time, short queries from many clients, lists of mixed texts.
"""

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from bench.client import drive, exchange, get, prepare, vectors
from bench.engines import min_cosine
from bench.inprocess import Worker
from bench.report import header, publish, ratios, spread, table
from bench.texts import text_sets
from jaxembed.checkpoint import DEFAULT_MODEL

CLIENTS = {"one query at a time": 1, "short queries": 32, "mixed texts, float": 4, "mixed texts, base64": 4}
"""Clients at a time in each load. Mixed texts come 32 in a request."""
LIST = 32
REST = 0.3
START_LIMIT = 600.0
PACKAGES = ("jaxembed", "jax", "jaxlib", "quart", "hypercorn", "uvloop", "torch", "sentence-transformers")

Numbers = dict[str, list[float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark as a program."""
    options = arguments(argv)
    # A signal must take the way through every `finally`, or the server would outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds, repeats = (1.0, 1) if options.quick else (options.seconds, options.repeats)
    sets = text_sets()
    queries = list(sets["queries"].texts)
    mixed = list(sets["mixed"].texts)
    starts: list[list[str]] = []
    with tempfile.TemporaryDirectory() as cache, Worker(options.model, options.dtype, queries, mixed) as worker:
        command = [options.model, "--dtype", options.dtype]
        if not options.quick:
            command += ["--cache-dir", cache]
            with server(command) as (_, process, ready):
                starts.append(["compiling every shape", f"{ready:.1f}", f"{resident(process.pid):,.0f}"])
        with server(command) as (port, process, ready):
            lists = [mixed[i : i + LIST] for i in range(0, len(mixed) - LIST + 1, LIST)]
            loads = {
                "one query at a time": [prepare(port, options.model, [text], "float") for text in queries],
                "short queries": [prepare(port, options.model, [text], "float") for text in queries],
                "mixed texts, float": [prepare(port, options.model, texts, "float") for texts in lists],
                "mixed texts, base64": [prepare(port, options.model, texts, "base64") for texts in lists],
            }
            cosines = asyncio.run(agreement(port, worker, loads, queries, lists, 2 if options.quick else 16))
            numbers = measure(port, process.pid, worker, loads, repeats, seconds)
            how = "shapes from the cache, if they were in it" if options.quick else "shapes from the cache"
            starts.append([how, f"{ready:.1f}", f"{resident(process.pid):,.0f}"])
    publish(report(starts, worker, cosines, numbers, seconds), options.out)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.http", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds through all loads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each load (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short repeat, one start: a smoke test")
    parser.add_argument("--out", type=Path, default=None, help="markdown file to write (default: print)")
    return parser.parse_args(argv)


@contextmanager
def server(command: Sequence[str]) -> Iterator[tuple[int, "subprocess.Popen[bytes]", float]]:
    """Start the server, wait until it is ready, and end it in every case.

    Yields:
        Its port, its process, and the seconds from start to ready.

    Raises:
        RuntimeError: it ended, or was not ready in time; the end of its log is in the message.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "jaxembed_server", *command, "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT)
        try:
            while asyncio.run(get(port, "/ready")) != 200:
                if process.poll() is not None or time.perf_counter() - start > START_LIMIT:
                    log.seek(0)
                    raise RuntimeError(f"the server did not become ready:\n{log.read()[-2000:].decode()}")
                time.sleep(0.05)
            yield port, process, time.perf_counter() - start
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def agreement(
    port: int,
    worker: Worker,
    loads: dict[str, list[bytes]],
    queries: Sequence[str],
    lists: Sequence[Sequence[str]],
    count: int,
) -> dict[str, float]:
    """Min cosine of the server's vectors to the reference, asked by as many clients as in the load itself."""
    cosines = {}
    for load, requests in loads.items():
        wanted = lists[:count] if "mixed" in load else [[text] for text in queries[: 16 * count]]
        bodies = await exchange(port, CLIENTS[load], requests[: len(wanted)])
        reference = worker.embed([text for texts in wanted for text in texts])
        cosines[load] = min_cosine(np.concatenate([vectors(body) for body in bodies]), reference)
    return cosines


def measure(
    port: int, pid: int, worker: Worker, loads: dict[str, list[bytes]], repeats: int, seconds: float
) -> Numbers:
    """Run every load on the server and its like in process, in turns.

    Returns:
        "engine: load" -> a number for each repeat: texts per second, or milliseconds for one query.
    """
    numbers: Numbers = defaultdict(list)
    for _ in range(repeats):
        for load, requests in loads.items():
            time.sleep(REST)
            used = processor_seconds(pid)
            one = asyncio.run(drive(port, CLIENTS[load], requests, seconds))
            count = len(one.milliseconds)
            numbers[f"server ms a request: {load}"].append((processor_seconds(pid) - used) / count * 1e3)
            numbers[f"client ms a request: {load}"].append(one.client / count * 1e3)
            numbers[f"p50: {load}"].append(float(np.percentile(one.milliseconds, 50)))
            numbers[f"p99: {load}"].append(float(np.percentile(one.milliseconds, 99)))
            numbers[f"server: {load}"].append(one.rate * (LIST if "mixed" in load else 1))
            if "base64" in load:
                continue
            for engine in worker.engines:
                time.sleep(REST)
                numbers[f"{engine}: {load}"].append(worker.measure(engine, load, seconds))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return numbers


def processor_seconds(pid: int) -> float:
    """CPU seconds that a process has used; NaN where there is no /proc."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.is_file():
        return float("nan")
    fields = stat.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    """Memory of a process in MB; NaN where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), float("nan"))


def report(
    starts: Sequence[Sequence[str]], worker: Worker, cosines: dict[str, float], numbers: Numbers, seconds: float
) -> str:
    """The result as markdown."""
    repeats = len(numbers["server: short queries"])
    served, inside, quotients = [], [], []
    for load, clients in CLIENTS.items():
        of = [
            numbers[f"{kind}: {load}"]
            for kind in ("server", "p50", "p99", "server ms a request", "client ms a request")
        ]
        digits = (0, 1, 1, 2, 2)
        served.append([load, str(clients), *map(spread, of, digits), f"{cosines[load]:.7f}"])
        alike = "mixed texts, float" if "mixed" in load else load
        one = "one" in load
        for engine in worker.engines:
            theirs, mine = numbers[f"{engine}: {alike}"], numbers[f"{'p50' if one else 'server'}: {load}"]
            quotients.append([f"{load}: server / {engine}", ratios(theirs, mine) if one else ratios(mine, theirs)])
    for engine in worker.engines:
        inside.append([engine, *(spread(numbers[f"{engine}: {load}"], 1) for load in list(CLIENTS)[:3])])
    inside += [[engine, why, "-", "-"] for engine, why in worker.absent.items()]
    return "\n\n".join(
        [
            header("Server over HTTP", PACKAGES, worker.device),
            table(["start of the server", "seconds to ready", "resident MB at the end"], starts),
            f"Median (least-largest) of {repeats} repeats of {seconds:g} s; CPU milliseconds are over all cores.",
            table(
                [
                    "load",
                    "clients",
                    "texts/s",
                    "p50 ms",
                    "p99 ms",
                    "server CPU ms a request",
                    "client CPU ms a request",
                    f"min cosine to {worker.reference}",
                ],
                served,
            ),
            f"In process, while the server is idle; texts per second of calls with {LIST} texts each.",
            table(["engine", "one query, ms (p50)", "short queries", "mixed texts"], inside),
            "How many times as fast, within a repeat: median (least-largest). Over 1, the server is faster.",
            table(["load", "ratio"], quotients),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
