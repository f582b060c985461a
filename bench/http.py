"""Servers as their users meet them, side by side: `python -m bench.http`. What the numbers mean: README.md.

1. Each server is started by its command line, twice: how long until the first vector, with nothing kept from an
   earlier start and with what the first one kept. The second start stays; it sleeps while others are measured.
2. Its vectors are compared with sentence-transformers', asked for by as many clients as in the load.
3. Ours has its shapes refined by such texts, as it does by itself after a while; so has our engine in process.
4. Each repeat runs each load on each server and on our engine in process, in turns; who begins changes.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.client import drive, exchange, prepare, vectors
from bench.engines import ENGINES, REFERENCE, min_cosine, start
from bench.http_report import LIST, LOADS, Measured, report
from bench.process import Worker
from bench.report import publish
from bench.servers import NAME, OURS, SERVERS, Server, begin
from bench.texts import text_sets
from jaxembed.checkpoint import DEFAULT_MODEL

REST = 0.3
SINGLES = 100
"""Queries in a row to our engine in process."""
REFINED = "the ladder after"
"""What our server logs once it has chosen its shapes anew."""
REFINE_LIMIT = 300.0
REFINE_AFTER = 5000
"""Inputs before that; the next time comes after ten times as many, which no run reaches."""
IDLE = 3.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark as a program."""
    options = arguments(argv)
    # A signal must take the way through every `finally`, or the servers would outlive us.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds, repeats = (1.0, 1) if options.quick else (options.seconds, options.repeats)
    sets = text_sets()
    texts = {"queries": list(sets["queries"].texts), "mixed": list(sets["mixed"].texts)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers, measured = started(options, folder, stack)
        requests = {name: prepared(server.port, texts) for name, server in servers.items()}
        ours = OURS[options.dtype]
        refined = not options.quick
        if refined:
            asyncio.run(refine(servers[ours], requests[ours]))
        engine = ENGINES[ours]
        engine = replace(engine, options={**engine.options, "refined": "all" if refined else "no"})
        worker = start(engine, options.model, folder)
        assert isinstance(worker, Worker)
        count = 2 if options.quick else 16
        stack.enter_context(closing(worker)).load(texts)
        measured.reference, wanted = reference(options, folder, texts, worker, count)
        compared(servers, requests, wanted, measured)
        for name, server in servers.items():
            measured.idle[name] = server.idle(IDLE)
        measure(servers, requests, worker, measured, repeats, seconds)
        for name, server in servers.items():
            measured.resident[name] = server.usage()[1]
    publish(report(measured, sets, ours, seconds, refined=refined), options.out)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.http", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=tuple(OURS), help="(default: %(default)s)")
    parser.add_argument("--servers", nargs="+", default=[], help="parts of the names of the peers (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds through all loads (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each load (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short repeat, one start each: a smoke test")
    parser.add_argument("--no-peers", action="store_true", help="only what the project's own environment has")
    parser.add_argument("--out", type=Path, default=None, help="markdown file to write (default: print)")
    return parser.parse_args(argv)


def started(options: argparse.Namespace, folder: Path, stack: ExitStack) -> tuple[dict[str, Server], Measured]:
    """Start the servers one by one, those before asleep."""
    servers: dict[str, Server] = {}
    measured = Measured()
    for spec in SERVERS[options.dtype]:
        own = spec.home is None
        wanted = not options.servers or any(part in spec.name for part in options.servers)
        if not own and (options.no_peers or not wanted):
            continue
        more = ("--refine-after", "0" if options.quick else str(REFINE_AFTER)) if own else ()
        cache = None if options.quick else folder / spec.name.replace(" ", "-")
        for _ in range(1 if options.quick else 2):
            if spec.name in servers:
                servers[spec.name].close()
            made = begin(spec, options.model, cache, *more)
            if isinstance(made, str):
                measured.absent[spec.name] = made
                break
            measured.first[spec.name].append(made.first)
            servers[spec.name] = stack.enter_context(closing(made))
        print(f"{spec.name}: {measured.absent.get(spec.name, measured.first[spec.name])}", file=sys.stderr)
    return servers, measured


def prepared(port: int, texts: Mapping[str, Sequence[str]]) -> dict[str, list[bytes]]:
    """Load -> its requests."""
    one = [prepare(port, NAME, [text], "float") for text in texts["queries"]]
    lists = [texts["mixed"][i : i + LIST] for i in range(0, len(texts["mixed"]) - LIST + 1, LIST)]
    wanted = {encoding: [prepare(port, NAME, part, encoding) for part in lists] for encoding in ("float", "base64")}
    return {load: wanted[kind.encoding] if kind.size > 1 else one for load, kind in LOADS.items()}


async def refine(server: Server, requests: Mapping[str, Sequence[bytes]]) -> None:
    """Send as many inputs as make our server look at its shapes, and wait until it has.

    Raises:
        RuntimeError: it took too long.
    """
    server.wake()
    sent = 0
    while sent < REFINE_AFTER:
        for load in ("short queries", "mixed texts, float"):
            await exchange(server.port, LOADS[load].clients, requests[load])
            sent += len(requests[load]) * LOADS[load].size
    deadline = time.perf_counter() + REFINE_LIMIT
    while REFINED not in server.log():
        if time.perf_counter() > deadline:
            raise RuntimeError(f"the shapes were not refined; the end of the log: {server.log()[-1000:]}")
        await asyncio.sleep(0.5)
    server.sleep()


def reference(
    options: argparse.Namespace, folder: Path, texts: Mapping[str, Sequence[str]], ours: Worker, count: int
) -> tuple[str, dict[str, np.ndarray]]:
    """Whose vectors, and set -> vectors of what `compared` asks: sentence-transformers', or of our engine in process
    where that does not run, or in a smoke test of ours alone."""
    first = {"queries": 16 * count, "mixed": LIST * count}
    made = "" if options.quick and options.no_peers else start(ENGINES[REFERENCE], options.model, folder)
    if isinstance(made, str):
        return "our engine in process", {name: ours.vectors(name, first[name]) for name in texts}
    with closing(made):
        made.load({name: texts[name][: first[name]] for name in texts})
        return REFERENCE, {name: made.vectors(name) for name in texts}


def compared(
    servers: Mapping[str, Server],
    requests: Mapping[str, Mapping[str, Sequence[bytes]]],
    wanted: Mapping[str, np.ndarray],
    measured: Measured,
) -> None:
    """Note the min cosine of each server's vectors, asked for by as many clients as in the load itself."""
    for name, server in servers.items():
        server.wake()
        for load, kind in LOADS.items():
            rows = wanted[kind.of]
            bodies = asyncio.run(exchange(server.port, kind.clients, requests[name][load][: len(rows) // kind.size]))
            measured.cosines[load, name] = min_cosine(np.concatenate([vectors(body) for body in bodies]), rows)
        server.sleep()


def measure(
    servers: Mapping[str, Server],
    requests: Mapping[str, Mapping[str, Sequence[bytes]]],
    worker: Worker,
    measured: Measured,
    repeats: int,
    seconds: float,
) -> None:
    """Run every load on every server and its like in process, in turns; then a lone query beside a bulk job on ours."""
    numbers = measured.numbers
    ours, *_ = servers
    order = [*servers, ""]
    for _ in range(repeats):
        for load, kind in LOADS.items():
            for name in order:
                time.sleep(REST)
                if name:
                    spell(servers[name], requests[name][load], kind.clients, seconds, kind.size, numbers[load, name])
                elif load == "one query at a time":
                    numbers[load, ""]["p50"].append(worker.ask("latency", of=kind.of, count=SINGLES))
                else:
                    numbers[load, ""]["rate"].append(worker.ask("calls", of=kind.of, size=LIST, seconds=seconds))
        time.sleep(REST)
        asyncio.run(beside(servers[ours], requests[ours], 2 * seconds, numbers["beside", ours]))
        numbers["beside", ours]["dispatch"].append(worker.ask("dispatch"))
        order.append(order.pop(0))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def spell(
    server: Server,
    requests: Sequence[bytes],
    clients: int,
    seconds: float,
    size: int,
    numbers: defaultdict[str, list[float]],
) -> None:
    """One load on one server."""
    server.wake()
    used = server.usage()[0]
    one = asyncio.run(drive(server.port, clients, requests, seconds))
    count = len(one.milliseconds)
    numbers["server"].append((server.usage()[0] - used) / count * 1e3)
    numbers["client"].append(one.client / count * 1e3)
    numbers["p50"].append(float(np.percentile(one.milliseconds, 50)))
    numbers["p99"].append(float(np.percentile(one.milliseconds, 99)))
    numbers["rate"].append(one.rate * size)
    server.sleep()


async def beside(
    server: Server, requests: Mapping[str, Sequence[bytes]], seconds: float, numbers: defaultdict[str, list[float]]
) -> None:
    """A client with one query at a time beside one that sends lists of texts all the while."""
    server.wake()
    lone, bulk = await asyncio.gather(
        drive(server.port, 1, requests["one query at a time"], seconds),
        drive(server.port, 1, requests["mixed texts, float"], seconds),
    )
    numbers["p50"].append(float(np.percentile(lone.milliseconds, 50)))
    numbers["p99"].append(float(np.percentile(lone.milliseconds, 99)))
    numbers["bulk"].append(bulk.rate * LIST)
    server.sleep()


if __name__ == "__main__":
    raise SystemExit(main())
