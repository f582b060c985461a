"""A ladder from what really comes: its lengths by exact dynamic programming over a histogram. Knows no JAX.

A small ladder is ready in seconds and pads much. Once enough inputs have been seen, the lengths are chosen again so
that their cost is least, their shapes are compiled beside the work, and the ladder is swapped.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jaxembed.buckets import Ladder
from jaxembed.types import Bucket

__all__ = ["Cost", "Histogram", "Refinable", "Timing", "choose_lengths", "fit_cost", "refine", "switch"]

WORTH = 0.01
"""A further length must save this share of the whole cost: each is several shapes to compile."""


GAIN = 0.05
"""A new ladder must save this share of what inputs cost by the old one."""


class Timing(NamedTuple):
    """How long one batch of a shape takes."""

    bucket: Bucket
    seconds: float


class Cost(NamedTuple):
    """Seconds of a batch: call + token * tokens + pair * tokens * length."""

    call: float
    token: float
    pair: float

    def of(self, bucket: Bucket) -> float:
        """Of one batch of this shape."""
        return self.call + bucket.tokens * (self.token + self.pair * bucket.seq_len)

    def of_row(self, length: int) -> float:
        """What a row of this length adds to a batch."""
        return length * (self.token + self.pair * length)


class Histogram:
    """How often each length has come. Safe to call from several threads.

    Args:
        max_length: the longest.
    """

    def __init__(self, max_length: int) -> None:
        self._counts = np.zeros(max_length + 1, np.int64)
        self._lock = threading.Lock()

    def add(self, lengths: Iterable[int]) -> None:
        """Count some inputs."""
        found = np.bincount(np.fromiter(lengths, np.int64), minlength=len(self._counts))
        with self._lock:
            self._counts += found

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """int64 [max_length + 1]: inputs of each length from 0 on."""
        with self._lock:
            return self._counts.copy()


def fit_cost(timings: Sequence[Timing]) -> Cost:
    """The cost that explains measured times best: least squares with no factor under 0.

    The residuals count relative to the time, so that the small shapes are not lost beside the large ones.
    """
    # Imported here: a server needs it long after its start, or never.
    from scipy.optimize import nnls

    seconds = np.array([timing.seconds for timing in timings])
    terms = np.array([(1, t.bucket.tokens, t.bucket.tokens * t.bucket.seq_len) for t in timings], np.float64)
    # Of like size, the factors can be found: seconds a call beside seconds a token and a pair of tokens.
    scale = terms.max(axis=0)
    factors, _ = nnls(terms / scale / seconds[:, None], np.ones(len(seconds)))
    return Cost(*(factors / scale))


def choose_lengths(counts: npt.NDArray[np.int64], cost: Callable[[int], float]) -> tuple[int, ...]:
    """The lengths l_1 < ... < l_k that cost least, where an input runs at the shortest of them that takes it.

    Exact over the candidates (multiples of 2 from 4 to 32, of 4 up to 64, of 8 up to 256, of 16 above): F[j] = min over
    i < j of F[i] + cost(l_j) * (inputs longer than l_i and up to l_j) + price.

    Args:
        counts: int64 [max_length + 1], inputs of each length. The greatest length is always among the chosen.
        cost: of one row of a length; rises with it.
    """
    longest = len(counts) - 1
    candidates = [
        n for n in (*range(4, 32, 2), *range(32, 64, 4), *range(64, 256, 8), *range(256, longest, 16)) if n < longest
    ]
    candidates.append(longest)
    upto = np.cumsum(counts)[candidates]
    costs = np.array([cost(n) for n in candidates])
    price = WORTH * float(np.dot(np.diff(upto, prepend=0), costs))
    best = np.empty(len(candidates))
    before = np.empty(len(candidates), np.int64)
    for j in range(len(candidates)):
        # i = -1 stands for nothing below.
        options = np.concatenate([[0.0], best[:j]]) + costs[j] * (upto[j] - np.concatenate([[0], upto[:j]]))
        before[j] = int(np.argmin(options)) - 1
        best[j] = options[before[j] + 1] + price
    chosen = []
    j = len(candidates) - 1
    while j >= 0:
        chosen.append(candidates[j])
        j = int(before[j])
    return tuple(reversed(chosen))


@runtime_checkable
class Refinable(Protocol):
    """What refinement needs of an engine; see `jaxembed.engine.Engine`."""

    ladder: Ladder
    max_batch_tokens: int
    batch_multiple: int

    def time(self, bucket: Bucket) -> float:
        """Seconds of a full batch of a compiled shape."""

    def allow(self, ladder: Ladder) -> None:
        """Let the shapes of a ladder be compiled."""

    def compile(self, bucket: Bucket) -> object:
        """Compile a shape; does nothing if it is ready."""

    def adopt(self, ladder: Ladder) -> None:
        """Plan by another ladder from now on."""


def refine(engine: Refinable, counts: npt.NDArray[np.int64]) -> Ladder | None:
    """Choose shapes for inputs like these, compile them, and only then have the engine plan by them.

    The shapes that the engine has are timed first: the choice goes by measured seconds.

    Args:
        engine: its ladder must be compiled.
        counts: int64 [max_length + 1], inputs of each length.

    Returns:
        The new ladder; None if it would save less than `GAIN`, and nothing was compiled.

    Raises:
        Exception: whatever a compilation raises; the engine keeps its ladder then.
    """
    old = engine.ladder
    within = counts[: old.max_length + 1]
    cost = fit_cost([Timing(bucket, engine.time(bucket)) for bucket in old.buckets])
    new = Ladder.of_lengths(
        choose_lengths(within, cost.of_row),
        max_batch_tokens=engine.max_batch_tokens,
        batch_multiple=engine.batch_multiple,
    )
    before, after = (row_seconds(ladder, within, cost) for ladder in (old, new))
    if after > (1 - GAIN) * before:
        return None
    switch(engine, new)
    return new


def switch(engine: Refinable, ladder: Ladder) -> None:
    """Compile the shapes of a ladder, and only then have the engine plan by them.

    Raises:
        Exception: whatever a compilation raises; the engine keeps its ladder then.
    """
    engine.allow(ladder)
    for bucket in ladder.buckets:
        engine.compile(bucket)
    engine.adopt(ladder)


def row_seconds(ladder: Ladder, counts: npt.NDArray[np.int64], cost: Cost) -> float:
    """What all inputs cost, each at the shortest length of a ladder that takes it."""
    lengths = sorted({bucket.seq_len for bucket in ladder.buckets})
    places = np.searchsorted(lengths, np.arange(len(counts)))
    return float(sum(count * cost.of_row(lengths[place]) for count, place in zip(counts, places, strict=True)))
