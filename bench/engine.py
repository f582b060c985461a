"""Engines on the same texts, in turns: `python -m bench.engine`. What the numbers mean: README.md.

1. Every engine gets a process of its own, under its own Python, and gives its first vector.
2. It embeds every set once: all shapes are compiled, and the vectors are compared.
3. Each repeat runs each set through each engine, one after the other, all others asleep; who begins changes from
   repeat to repeat.
4. Ratios are taken within a repeat; medians over the repeats are shown.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from bench.engines import ENGINES, ON_ACCELERATOR, ON_CPU, OURS, REFERENCE, min_cosine, start
from bench.process import Worker
from bench.report import header, publish, ratios, spread, table
from bench.texts import SETS, TextSet, text_sets
from jaxembed.checkpoint import DEFAULT_MODEL

REST = 0.3
"""Seconds before each timing, in which the engine before falls asleep and the clocks of the cores settle."""

SINGLES = 100
"""Queries sent one at a time in each repeat."""

SINGLE = "queries"
"""The set they are taken from."""

COPIES = 8
"""An accelerator gets each text so many times: it would be through in some ten milliseconds."""

QUICK = 32
"""A smoke test takes one text in so many."""

Times = dict[str, dict[str, list[float]]]
"""Engine -> set, or "one" -> a number for each repeat: texts per second, or milliseconds for one query (p50)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark as a program."""
    begun = time.monotonic()
    options = arguments(argv)
    sets = {name: one for name, one in text_sets().items() if name in {*options.sets, SINGLE}}
    if options.quick:
        sets = {name: one.first(len(one.texts) // QUICK) for name, one in sets.items()}
    if options.accelerator:
        sets = {name: one.times(COPIES) for name, one in sets.items()}
    engines = ON_ACCELERATOR if options.accelerator else ON_CPU
    parts = [part for part in options.engines if part not in engines]
    wanted = [name for name in engines if name in options.engines or any(part in name for part in parts)]
    names = wanted if options.engines else list(engines)
    if options.quick and not options.engines:
        # One of ours and the peers: a smoke test has two minutes.
        names = [name for name in names if name not in OURS[1:]]
    with ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        workers, absent = prepare(names, options.model, sets, Path(folder), stack, peers=not options.no_peers)
        cosines = agreement(workers, sets)
        singles, repeats = (20, 2) if options.quick else (SINGLES, options.repeats)
        times = measure(workers, options.sets, singles, repeats, begun + options.limit)
        publish(report([sets[name] for name in options.sets], workers, absent, cosines, times), options.out)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="texts (default: all)")
    parser.add_argument("--engines", nargs="+", default=[], help="names, or parts of them, to run (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds through all engines (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, default=math.inf, help="seconds after which no repeat begins, as on a lent machine"
    )
    parser.add_argument("--accelerator", action="store_true", help=f"the engines for one, on texts {COPIES} times over")
    parser.add_argument("--quick", action="store_true", help="few texts, two repeats, one of our engines: a smoke test")
    parser.add_argument("--no-peers", action="store_true", help="only what the project's own environment has")
    parser.add_argument("--out", type=Path, default=None, help="markdown file to write (default: print)")
    return parser.parse_args(argv)


def prepare(
    names: Sequence[str], model: str, sets: Mapping[str, TextSet], folder: Path, stack: ExitStack, *, peers: bool
) -> tuple[dict[str, Worker], dict[str, str]]:
    """Start the engines one by one: those that run, ready for the sets, and for the others why not."""
    workers: dict[str, Worker] = {}
    absent: dict[str, str] = {}
    device: str | None = "cpu"
    for name in names:
        begun = time.perf_counter()
        made = start(ENGINES[name], model, folder, device=device, peers=peers)
        if isinstance(made, str):
            absent[name] = made
            continue
        workers[name] = stack.enter_context(closing(made))
        if name in OURS and not made.note.startswith("on cpu"):
            # The reference runs on the kind of device that ours runs on.
            device = None
        made.load({name: one.texts for name, one in sets.items()})
        print(f"{name}: ready after {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    return workers, absent


def agreement(workers: Mapping[str, Worker], sets: Mapping[str, TextSet]) -> dict[str, float]:
    """Min cosine of each engine to the reference over all sets; empty without the reference."""
    if REFERENCE not in workers:
        return {}
    reference = {name: workers[REFERENCE].vectors(name) for name in sets}
    return {
        engine: min(min_cosine(worker.vectors(name), reference[name]) for name in sets)
        for engine, worker in workers.items()
    }


def measure(workers: Mapping[str, Worker], sets: Sequence[str], singles: int, repeats: int, until: float) -> Times:
    """Time every engine on every set and on single queries, in turns; no repeat but the first begins after `until`."""
    times: Times = {name: {what: [] for what in (*sets, "one")} for name in workers}
    order = list(workers)
    for done in range(repeats):
        if done and time.monotonic() > until:
            break
        for what in (*sets, "one"):
            for name in order:
                time.sleep(REST)
                ask = workers[name].ask
                value = ask("latency", of=SINGLE, count=singles) if what == "one" else ask("rate", of=what)
                times[name][what].append(value)
        order.append(order.pop(0))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def report(
    sets: Sequence[TextSet],
    workers: Mapping[str, Worker],
    absent: Mapping[str, str],
    cosines: Mapping[str, float],
    times: Times,
) -> str:
    """The result as markdown."""
    columns = [one.name for one in sets]
    speeds, quotients, remarks = [], [], []
    for name in ENGINES:
        if name in absent:
            speeds.append([name, absent[name], *["-"] * (len(columns) + 3)])
        if name not in workers:
            continue
        mine, worker = times[name], workers[name]
        cosine = f"{cosines[name]:.7f}" if cosines else "no reference"
        numbers = [*(spread(mine[what]) for what in columns), spread(mine["one"], 2)]
        speeds.append([name, *numbers, cosine, f"{worker.resident:,.0f}", f"{worker.cold:.1f}"])
        versions = ", ".join(f"{package} {version}" for package, version in worker.versions.items())
        remarks.append(f"- {name}: {versions}{'; ' if worker.note else ''}**{worker.note}**".replace("****", ""))
    for name in OURS:
        for peer in workers:
            if name in workers and peer not in OURS:
                faster = [ratios(times[name][what], times[peer][what]) for what in columns]
                quotients.append([f"{name} / {peer}", *faster, ratios(times[peer]["one"], times[name]["one"])])
    repeats = len(next(iter(times.values()))["one"])
    return "\n\n".join(
        [
            header("Engines in process"),
            table(
                ["set", "texts", "tokens", "tokens a text: 0/5/50/95/100 %", "digest"],
                [one.row() for one in sets],
            ),
            f"Texts per second and milliseconds for one query (p50): median (least-largest) of {repeats} repeats.",
            table(
                ["engine", *columns, "one query, ms", f"min cosine to {REFERENCE}", "RSS MB", "cold start, s"],
                speeds,
            ),
            "\n".join(remarks),
            "How many times as fast, within a repeat: median (least-largest). Over 1, the first is faster.",
            table(["engines", *columns, "one query"], quotients),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
