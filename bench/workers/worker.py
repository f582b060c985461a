"""One engine in a process of its own: `python worker.py MODULE OPTIONS`, then a JSON line in, a JSON line out.

It runs under the engine's own Python, where jaxembed and `bench` need not be importable: the standard library and the
module's own imports are all it takes. A module has `PACKAGES` and `make(**options)`, which gives an engine: `encode`
for texts -> float32 [n, D]; and, where the engine has something to say or to get ready, `note`, `ready(sets)`,
`use(set)` and `dispatch()`.
"""

import time

START = time.perf_counter()

import base64  # noqa: E402 - the clock of the cold start is the first thing.
import importlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
from importlib.metadata import PackageNotFoundError, version  # noqa: E402

FIRST = "How long does it take until the first vector is there?"


class Session:
    """Answers questions about one engine: each public method is one."""

    def __init__(self, engine):
        self._engine = engine
        self._sets = {}

    def load(self, sets):
        """Take texts, get ready for them (compile, refine), and run each set once."""
        self._sets = sets
        if hasattr(self._engine, "ready"):
            self._engine.ready(sets)
        for name, texts in sets.items():
            self._use(name)
            self._engine.encode(texts)

    def vectors(self, of, first=None):
        """[n, D] of a set, or of its first texts, as (D, base64 of little-endian float32)."""
        self._use(of)
        rows = self._engine.encode(self._sets[of][:first])
        return rows.shape[1], base64.b64encode(rows.astype("<f4").tobytes()).decode()

    def rate(self, of):
        """Texts per second, all of a set in one call."""
        self._use(of)
        texts = self._sets[of]
        start = time.perf_counter()
        self._engine.encode(texts)
        return len(texts) / (time.perf_counter() - start)

    def latency(self, of, count):
        """Median milliseconds of one text, each in a call of its own."""
        self._use(of)
        taken = []
        for text in self._sets[of][:count]:
            start = time.perf_counter()
            self._engine.encode([text])
            taken.append(time.perf_counter() - start)
        return statistics.median(taken) * 1e3

    def calls(self, of, size, seconds):
        """Texts per second in calls of `size` texts, for so many seconds."""
        self._use(of)
        texts = self._sets[of]
        calls = [texts[i : i + size] for i in range(0, len(texts) - size + 1, size)]
        done = 0
        start = time.perf_counter()
        for call in itertools.cycle(calls):
            self._engine.encode(call)
            done += len(call)
            if time.perf_counter() - start > seconds:
                return done / (time.perf_counter() - start)

    def dispatch(self):
        """Milliseconds of the longest single dispatch that the engine makes."""
        return self._engine.dispatch() * 1e3

    def _use(self, name):
        if hasattr(self._engine, "use"):
            self._engine.use(name)


def main():
    """Make the engine, say how that went, and answer until the input ends."""
    # Libraries print; what they print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = importlib.import_module(sys.argv[1])
    engine = module.make(**json.loads(sys.argv[2]))
    engine.encode([FIRST])
    cold = time.perf_counter() - START
    hello = {"cold": cold, "note": getattr(engine, "note", ""), "versions": versions(module.PACKAGES)}
    print(json.dumps(hello), file=answers)
    session = Session(engine)
    for line in sys.stdin:
        kind, options = json.loads(line)
        print(json.dumps(getattr(session, kind)(**options)), file=answers)


def versions(packages):
    """The versions of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
