"""What HTTP costs: CPU time of the server process per request, around an engine that has its vectors ready.

`python -m bench.overhead [TREE ...]`: each TREE is a checkout of jaxembed; they are measured in turns, which alone
makes two of them comparable. README.md explains the other benchmarks; this one needs no quiet machine, since it counts
CPU time and not the time that passed, but a busy one still takes the caches away.
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

LIST = 32
CASES = {
    "1 short text, float": (1, "queries", "float"),
    "1 short text, base64": (1, "queries", "base64"),
    f"{LIST} mixed texts, float": (LIST, "mixed", "float"),
    f"{LIST} mixed texts, base64": (LIST, "mixed", "base64"),
}
"""Name -> texts in a request, their set, the format asked for."""
CLIENTS = (1, 32)
TICK = 1e-9


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement, or with --serve the server that it measures."""
    options = arguments(argv)
    if options.serve:
        return serve(options.serve, accelerator=options.accelerator)
    from bench.report import table
    from bench.texts import text_sets

    sets = text_sets()
    found: dict[tuple[str, int, str], list[tuple[float, float, float]]] = defaultdict(list)
    running: dict[str, Served] = {}
    try:
        for tree in options.trees:
            running[str(tree)] = served = Served(tree, accelerator=options.accelerator)
            served.wait_until_ready()
        for turn in range(options.repeats):
            for name, (size, source, encoding) in CASES.items():
                if options.only and options.only not in name:
                    continue
                texts = sets[source].texts
                lists = [texts[i : i + size] for i in range(0, len(texts) - size + 1, size)]
                for clients in CLIENTS:
                    # Each begins as often as the others.
                    trees = list(running)
                    for tree in trees[turn % len(trees) :] + trees[: turn % len(trees)]:
                        found[name, clients, tree].append(running[tree].measure(clients, lists, encoding, options))
    finally:
        for served in running.values():
            served.process.kill()
            served.process.wait()
    rows = []
    for (name, clients, tree), numbers in found.items():
        cpu, p50, rate = map(statistics.median, zip(*numbers, strict=True))
        rows.append([name, str(clients), tree, f"{cpu:.3f}", f"{p50:.2f}", f"{rate:,.0f}"])
    print(table(["request", "clients", "tree", "CPU ms a request", "p50 ms", "requests/s"], rows))
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("trees", nargs="*", type=Path, default=[Path.cwd()], metavar="TREE")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each spell of load")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", metavar="TEXT", help="only the cases whose name holds this")
    parser.add_argument("--accelerator", action="store_true", help="shapes and batches as on a GPU")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class Served:
    """A server of one checkout in a process of its own, ready to be measured."""

    def __init__(self, tree: Path, *, accelerator: bool) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # -P: the folder of this file holds an http.py, which must not stand for Python's.
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, "--serve", str(self.port), *["--accelerator"] * accelerator],
            env={**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'server'}"},
            stdout=subprocess.DEVNULL,
        )

    def wait_until_ready(self) -> None:
        """Returns when it serves.

        Raises:
            RuntimeError: it has ended, or takes too long.
        """
        deadline = time.monotonic() + 60
        while asyncio.run(self._status()) != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("a server did not start")
            time.sleep(0.1)

    async def _status(self) -> int:
        from bench.client import post, prepare

        return await post(self.port, prepare(self.port, "", ["ready"], "float"))

    def measure(
        self, clients: int, lists: Sequence[Sequence[str]], encoding: str, options: argparse.Namespace
    ) -> tuple[float, float, float]:
        """CPU milliseconds of a request, median milliseconds until its answer, and requests a second."""
        from bench.client import drive, prepare

        requests = [prepare(self.port, "", texts, encoding) for texts in lists]
        asyncio.run(drive(self.port, clients, requests, 0.2))
        before = self._cpu()
        load = asyncio.run(drive(self.port, clients, requests, options.seconds))
        count = len(load.milliseconds)
        return (self._cpu() - before) * 1e3 / count, statistics.median(load.milliseconds), load.rate

    def _cpu(self) -> float:
        """CPU seconds of all threads so far, from the scheduler: the clock ticks of `stat` are too coarse."""
        tasks = Path(f"/proc/{self.process.pid}/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) * TICK


def serve(port: int, *, accelerator: bool) -> int:
    """The server as it is, with the default model's tokenizer and an engine that computes nothing."""
    import numpy as np
    import numpy.typing as npt

    from jaxembed.buckets import Ladder
    from jaxembed.checkpoint import DEFAULT_MODEL, Checkpoint
    from jaxembed.cost import ACCELERATOR_PRICES
    from jaxembed.matryoshka import Matryoshka
    from jaxembed.tokenizer import Tokenizer
    from jaxembed.types import Batch
    from jaxembed_server import cli
    from jaxembed_server.config import ServerConfig
    from jaxembed_server.model import Loaded, Progress

    class Ready:
        """Its vectors are unit vectors made at the start."""

        def __init__(self) -> None:
            self.ladder = Ladder.default(max_length=256, max_batch_tokens=16_384 if accelerator else 1024)
            if accelerator:
                self.ladder.prices = ACCELERATOR_PRICES
            self.side_by_side, self.shares_cores = (2, False) if accelerator else (1, True)
            self.dimension = 384
            rows = (self.ladder.max_rows, self.dimension)
            vectors = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
            self._vectors: npt.NDArray[np.float32] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        def run(self, batch: Batch) -> npt.NDArray[np.float32]:
            return self._vectors[: batch.rows]

        def computed(self, batch: Batch) -> int:
            return batch.bucket.tokens

    def load(config: ServerConfig, progress: Progress) -> Loaded:
        checkpoint = Checkpoint.open(DEFAULT_MODEL)
        tokenizer = Tokenizer.from_folder(checkpoint.folder, vocab_size=30522, max_length=256)
        return Loaded(checkpoint, tokenizer, Ready(), Matryoshka(384, (), False))  # type: ignore[arg-type]

    config = ServerConfig(port=port, refine_after=0)
    make = cli.event_loop()
    with asyncio.Runner(loop_factory=make) as runner:
        return runner.run(cli.run(config, load))


if __name__ == "__main__":
    sys.exit(main())
