"""Cost as work grows: `python -m bench.growth`. 100, 10,000 and, if asked, 1,000,000 texts through `Embedder.encode`.

Each number of texts gets a process of its own, so that its peak memory is its own. The texts have two or three
words and are alike for every number; each text of a run is another. The shapes are refined for them first.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench.report import header, publish, table
from bench.texts import docstrings
from jaxembed.checkpoint import DEFAULT_MODEL

COUNTS = (100, 10_000)
MILLION = 1_000_000
WORDS = 1000
"""Different words: their pairs, every other time with a third, are the texts."""
STEP = 7919
SAMPLE = 1000
"""Texts by which the shapes are chosen, and whose tokens are counted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark as a program."""
    options = arguments(argv)
    if options.count:
        print(json.dumps(run(options.count, options.model, options.dtype)))
        return 0
    rows = []
    for count in (*COUNTS, MILLION) if options.million else COUNTS:
        line = [sys.executable, "-m", "bench.growth", "--count", str(count)]
        line += ["--model", options.model, "--dtype", options.dtype]
        done = subprocess.run(line, stdout=subprocess.PIPE, check=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(found)
        print(f"{count:,} texts: {found['rate']:.0f} texts/s", file=sys.stderr)
    publish(report(rows, options.dtype), options.out)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: %(default)s)")
    parser.add_argument("--million", action="store_true", help="1,000,000 texts too, which takes long on a CPU")
    parser.add_argument("--count", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="markdown file to write (default: print)")
    return parser.parse_args(argv)


def texts(count: int) -> list[str]:
    """So many different texts of two or three words."""
    found = dict.fromkeys(word for text in docstrings() for word in text.split() if word.isalpha() and len(word) < 8)
    words = list(found)[:WORDS]
    made = []
    for i in range(count):
        # A step that has no factor in common with the number of pairs meets each of them once, in no order.
        second, first = divmod(i * STEP % WORDS**2, WORDS)
        third = f" {words[first - second]}" if i % 2 else ""
        made.append(f"{words[first]} {words[second]}{third}")
    return made


def run(count: int, model: str, dtype: str) -> dict[str, float]:
    """Encode so many texts, all in one call, every shape chosen and compiled before."""
    from jaxembed import Embedder
    from jaxembed.warmup import cache_folder, use_cache, warm

    use_cache(cache_folder())
    embedder = Embedder.from_pretrained(model, dtype=dtype)
    warm(embedder.engine)
    given = texts(count)
    embedder.refine(texts(SAMPLE))
    embedder.encode(given[:100])
    before = peak()
    # A short run is over before it can be timed: the fastest of several is the one that nobody disturbed.
    taken = []
    for _ in range(5 if count <= 1000 else 1):
        start = time.perf_counter()
        vectors = embedder.encode(given, show_progress_bar=count >= MILLION)
        taken.append(time.perf_counter() - start)
    tokens = sum(map(len, embedder.tokenizer.encode_texts(given[:SAMPLE])))
    return {
        "count": count,
        "rate": count / min(taken),
        "tokens": tokens / min(count, SAMPLE),
        "before": before,
        "peak": peak(),
        "result": vectors.nbytes / 2**20,
    }


def peak() -> float:
    """Peak memory of this process so far, in MB."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10


def report(rows: Sequence[dict[str, float]], dtype: str) -> str:
    """The result as markdown."""
    lines = [
        [
            f"{row['count']:,}",
            f"{row['tokens']:.1f}",
            f"{row['rate']:,.0f}",
            f"{row['rate'] / rows[0]['rate']:.2f}",
            f"{row['before']:,.0f}",
            f"{row['peak']:,.0f}",
            f"{row['result']:,.0f}",
            f"{row['peak'] - row['before'] - row['result']:,.0f}",
        ]
        for row in rows
    ]
    head = ["texts", "tokens a text", "texts/s", "against the first", "peak MB before", "peak MB after"]
    return "\n\n".join(
        [
            header(f"As work grows, {dtype}"),
            table([*head, "MB of the result", "MB beside the result"], lines),
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
