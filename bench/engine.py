"""Engines in one process on the same texts, in turns: `python -m bench.engine`. What the numbers mean: README.md.

1. Every engine is made and embeds every set once: all shapes are compiled, and the vectors are compared.
2. Each repeat runs each set through each engine, one after the other; who begins changes from repeat to repeat.
3. Ratios are taken within a repeat; medians over the repeats are shown.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.engines import ENGINES, OURS, REFERENCE, Engine, make, min_cosine
from bench.report import header, publish, ratios, spread, table
from bench.texts import SETS, TextSet, text_sets
from jaxembed.checkpoint import DEFAULT_MODEL

REST = 0.3
"""Seconds before each timing: thread pools of the engine before spin for a while when they have no more to do."""

SINGLES = 100
"""Queries sent one at a time in each repeat."""

PACKAGES = ("jaxembed", "jax", "jaxlib", "torch", "onnxruntime", "sentence-transformers", "transformers", "tokenizers")

Times = dict[str, dict[str, list[float]]]
"""Engine -> set, or "one" -> a number for each repeat: texts per second, or milliseconds for one query (p50)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark as a program."""
    options = arguments(argv)
    sets = text_sets()
    if options.quick:
        sets = {name: one.first(len(one.texts) // 32) for name, one in sets.items()}
    texts = {name: one for name, one in sets.items() if name in options.sets}
    singles = sets["queries"].texts[: 20 if options.quick else SINGLES]
    engines, absent = prepare(options.model, texts)
    cosines = agreement(engines, texts)
    times = measure(engines, texts, singles, 2 if options.quick else options.repeats)
    publish(report(texts, absent, cosines, times), options.out)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS, help="texts (default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="rounds through all engines (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="few texts, two repeats: a smoke test")
    parser.add_argument("--out", type=Path, default=None, help="markdown file to write (default: print)")
    return parser.parse_args(argv)


def prepare(model: str, texts: Mapping[str, TextSet]) -> tuple[dict[str, Engine], dict[str, str]]:
    """Make the engines: those that run, and for the others why not."""
    engines: dict[str, Engine] = {}
    absent: dict[str, str] = {}
    for name in ENGINES:
        made = make(name, model)
        if isinstance(made, str):
            absent[name] = made
        else:
            engines[name] = made
    return engines, absent


def agreement(engines: Mapping[str, Engine], texts: Mapping[str, TextSet]) -> dict[str, float]:
    """Min cosine of each engine to the reference over all sets; the run also warms every shape of every engine."""
    vectors = {name: [engine.encode(one.texts) for one in texts.values()] for name, engine in engines.items()}
    reference = vectors.get(REFERENCE)
    if reference is None:
        return {}
    return {name: min(map(min_cosine, mine, reference)) for name, mine in vectors.items()}


def measure(engines: Mapping[str, Engine], texts: Mapping[str, TextSet], singles: Sequence[str], repeats: int) -> Times:
    """Time every engine on every set and on single queries, in turns."""
    times: Times = {name: {what: [] for what in (*texts, "one")} for name in engines}
    order = list(engines)
    for _ in range(repeats):
        for what in (*texts, "one"):
            for name in order:
                time.sleep(REST)
                encode = engines[name].encode
                value = latency(encode, singles) if what == "one" else throughput(encode, texts[what].texts)
                times[name][what].append(value)
        order.append(order.pop(0))
        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return times


def throughput(encode: Callable[[Sequence[str]], object], texts: Sequence[str]) -> float:
    """Texts per second, all of them in one call."""
    start = time.perf_counter()
    encode(texts)
    return len(texts) / (time.perf_counter() - start)


def latency(encode: Callable[[Sequence[str]], object], texts: Sequence[str]) -> float:
    """Median milliseconds of one text, each in a call of its own."""
    taken = []
    for text in texts:
        start = time.perf_counter()
        encode([text])
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def report(texts: Mapping[str, TextSet], absent: Mapping[str, str], cosines: Mapping[str, float], times: Times) -> str:
    """The result as markdown."""
    import jax

    repeats = len(next(iter(times.values()))["one"])
    speeds, quotients = [], []
    for name in ENGINES:
        if name in absent:
            speeds.append([name, absent[name], *["-"] * (len(texts) + 1)])
            continue
        mine = times[name]
        cosine = f"{cosines[name]:.7f}" if cosines else "no reference"
        speeds.append([name, *(spread(mine[what]) for what in texts), spread(mine["one"], 2), cosine])
    for name in OURS:
        for peer in ENGINES:
            if peer not in OURS and peer not in absent:
                faster = [ratios(times[name][what], times[peer][what]) for what in texts]
                quotients.append([f"{name} / {peer}", *faster, ratios(times[peer]["one"], times[name]["one"])])
    device = jax.devices()[0].device_kind
    return "\n\n".join(
        [
            header("Engines in one process", PACKAGES, f"{jax.default_backend()} ({device})"),
            table(
                ["set", "texts", "tokens", "tokens a text: 0/5/50/95/100 %", "digest"],
                [t.row() for t in texts.values()],
            ),
            f"Texts per second and milliseconds for one query (p50): median (least-largest) of {repeats} repeats.",
            table(["engine", *texts, "one query, ms", f"min cosine to {REFERENCE}"], speeds),
            "How many times as fast, within a repeat: median (least-largest). Over 1, the first is faster.",
            table(["engines", *texts, "one query"], quotients),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
