"""A ladder from what really comes: its lengths by exact dynamic programming over a histogram. Knows no JAX.

A small ladder is ready in seconds and pads much. Once enough inputs have been seen, the lengths are chosen again so
that their cost is least, their shapes are compiled beside the work, and the ladder is swapped.
"""

import math
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jaxembed.buckets import MEAN, Ladder, flat_shapes
from jaxembed.types import Bucket

__all__ = [
    "Cost",
    "Histogram",
    "Refinable",
    "Timing",
    "choose_lengths",
    "choose_shapes",
    "fit_cost",
    "least_seconds",
    "refine",
    "switch",
]

WORTH = 0.01
"""A further length must save this share of the whole cost: each is several shapes to compile."""

FLAT_WORTH = 0.05
"""The same of flat shapes, of each of whose lengths there are more."""

NEAR = 0.05
"""A shape must save this share of what a batch takes in a larger one: each is to be compiled and held in memory."""

SMALL = 4
"""Shapes of at most a full batch over this are timed before they are chosen: they keep least to the fit."""

ROUNDS = 3
"""How often a shape is timed."""

SIZES = (1, 1 / 2, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16)
"""Tokens of flat shapes, in parts of the largest one's."""

LEAST = 32
"""A flat shape has at least so many."""

GAIN = 0.05
"""A new ladder must save this share of what inputs cost by the old one, each alone or all together."""

SAMPLE = 4096
"""Inputs that this is reckoned for."""


class Timing(NamedTuple):
    """How long one batch of a shape takes."""

    bucket: Bucket
    seconds: float


class Cost(NamedTuple):
    """Seconds of a batch: call + token * tokens + place * places + pair * places * length."""

    call: float
    token: float
    place: float
    pair: float

    def of(self, bucket: Bucket) -> float:
        """Of one batch of this shape."""
        return self.call + bucket.tokens * self.token + bucket.batch_size * self.of_places(bucket.seq_len)

    def of_row(self, length: int) -> float:
        """What a row of this length adds to a padded batch."""
        return length * self.token + self.of_places(length)

    def of_places(self, length: int) -> float:
        """What a row of at most this length adds to a flat batch of rows of this length, beside its tokens."""
        return length * (self.place + self.pair * length)


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
    sizes = [(t.bucket.tokens, t.bucket.places, t.bucket.places * t.bucket.seq_len) for t in timings]
    terms = np.array([(1, *of) for of in sizes], np.float64)
    # Of like size, the factors can be found: seconds a call beside seconds a token and a pair of tokens.
    scale = terms.max(axis=0)
    factors, _ = nnls(terms / scale / seconds[:, None], np.ones(len(seconds)))
    return Cost(*(factors / scale))


def choose_lengths(
    counts: npt.NDArray[np.int64], cost: Callable[[int], float], *, fixed: float = 0.0, worth: float = WORTH
) -> tuple[int, ...]:
    """The lengths l_1 < ... < l_k that cost least, where an input runs at the shortest of them that takes it.

    Exact over the candidates (multiples of 2 from 4 to 32, of 4 up to 64, of 8 up to 256, of 16 above): F[j] = min over
    i < j of F[i] + cost(l_j) * (inputs longer than l_i and up to l_j) + price.

    Args:
        counts: int64 [max_length + 1], inputs of each length. The greatest length is always among the chosen.
        cost: of one row of a length; rises with it.
        fixed: what all inputs cost beside that, whatever the lengths.
        worth: a further length must save this share of the whole cost.
    """
    longest = len(counts) - 1
    candidates = [
        n for n in (*range(4, 32, 2), *range(32, 64, 4), *range(64, 256, 8), *range(256, longest, 16)) if n < longest
    ]
    candidates.append(longest)
    upto = np.cumsum(counts)[candidates]
    costs = np.array([cost(n) for n in candidates])
    price = worth * (fixed + float(np.dot(np.diff(upto, prepend=0), costs)))
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


def flat_ladder(counts: npt.NDArray[np.int64], cost: Cost, max_batch_tokens: int) -> Ladder:
    """The shapes that inputs cost least in, where there are flat ones.

    Single rows are padded, and so are full batches of rows that are alike, as out of a large job: of these there are
    shapes of many lengths. What happened to come together is of all lengths: for that there are flat shapes, of few
    lengths, since only attention pads, but of many sizes.

    Args:
        counts: int64 [max_length + 1], inputs of each length.
        cost: of shapes.
        max_batch_tokens: of the largest shapes of several rows.
    """
    shapes = []
    for length in choose_lengths(counts, cost.of_row):
        shapes += [Bucket(1, length), Bucket(max(1, max_batch_tokens // length), length)]
    sizes = [size for part in SIZES if (size := int(max_batch_tokens * part)) >= LEAST]
    fixed = cost.token * float(np.dot(counts, np.arange(len(counts))))
    before = -1
    for length in choose_lengths(counts, cost.of_places, fixed=fixed, worth=FLAT_WORTH):
        shapes += flat_shapes(length, sizes, mean_length(counts, before + 1, length) or MEAN * length)
        before = length
    return Ladder(shapes)


def mean_length(counts: npt.NDArray[np.int64], shortest: int, longest: int) -> float:
    """Mean length of the inputs between two lengths; 0 if there are none."""
    came = counts[shortest : longest + 1]
    return float(np.dot(came, np.arange(shortest, longest + 1))) / came.sum() if came.any() else 0.0


def choose_shapes(
    wanted: Iterable[Bucket], there: Iterable[Bucket], seconds: Callable[[Bucket], float]
) -> tuple[Bucket, ...]:
    """The wanted shapes, but for those that a larger shape does nearly as fast (`NEAR`): it takes their place.

    Args:
        wanted: shapes to choose from.
        there: shapes that are compiled already; one of them that does nearly as well is chosen instead of a wanted one.
        seconds: of a full batch of a shape.
    """
    there = tuple(there)
    chosen: list[Bucket] = []
    # The largest first: what may take a shape's place is decided on before it.
    for bucket in sorted(wanted, key=lambda bucket: bucket.tokens, reverse=True):
        near = [
            one
            for one in (*chosen, *there)
            if one.batch_size >= bucket.batch_size
            and one.tokens >= bucket.tokens
            and one.seq_len >= bucket.seq_len
            and (1 - NEAR) * seconds(one) <= seconds(bucket)
        ]
        best = min(near, key=seconds, default=bucket)
        if best not in chosen:
            chosen.append(best)
    return tuple(chosen)


@runtime_checkable
class Refinable(Protocol):
    """What refinement needs of an engine; see `jaxembed.engine.Engine`."""

    ladder: Ladder
    max_batch_tokens: int
    batch_multiple: int
    flat: bool

    def time(self, bucket: Bucket) -> float:
        """Seconds of one full batch of a compiled shape."""

    def allow(self, ladder: Ladder) -> None:
        """Let the shapes of a ladder be compiled."""

    def compile(self, bucket: Bucket) -> object:
        """Compile a shape; does nothing if it is ready."""

    def adopt(self, ladder: Ladder) -> None:
        """Plan by another ladder from now on."""


def refine(engine: Refinable, counts: npt.NDArray[np.int64]) -> Ladder | None:
    """Choose shapes for inputs like these, compile them, and only then have the engine plan by them.

    The shapes that the engine has are timed first, and the small new ones once they are compiled: the choice goes by
    measured seconds.

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
    measured = least_seconds(engine, old.buckets)
    cost = fit_cost([Timing(*one) for one in measured.items()])
    if engine.flat:
        wanted = flat_ladder(within, cost, engine.max_batch_tokens)
    else:
        wanted = Ladder.of_lengths(
            choose_lengths(within, cost.of_row),
            max_batch_tokens=engine.max_batch_tokens,
            batch_multiple=engine.batch_multiple,
        )
    sample = sampled(within)
    if all(seconds(wanted, sample, cost) > (1 - GAIN) * seconds(old, sample, cost) for seconds in (alone, together)):
        return None

    def seconds(bucket: Bucket) -> float:
        return measured[bucket] if bucket in measured else cost.of(bucket)

    def small(bucket: Bucket) -> bool:
        return bucket.tokens * SMALL <= wanted.batch_tokens

    large = choose_shapes((one for one in wanted.buckets if not small(one)), old.buckets, seconds)
    likely = Ladder([*filter(small, wanted.buckets), *large])
    prepare(engine, likely)
    measured |= least_seconds(engine, filter(small, {*old.buckets, *likely.buckets}))
    new = Ladder(choose_shapes(likely.buckets, old.buckets, seconds))
    switch(engine, new)
    return new


def least_seconds(engine: Refinable, buckets: Iterable[Bucket]) -> dict[Bucket, float]:
    """Shape -> seconds of a full batch, the least of several.

    All of them are timed in turns, so that other work in between strikes them alike.
    """
    found = dict.fromkeys(buckets, math.inf)
    for _ in range(ROUNDS):
        for bucket, least in found.items():
            found[bucket] = min(least, engine.time(bucket))
    return found


def switch(engine: Refinable, ladder: Ladder) -> None:
    """Compile the shapes of a ladder, and only then have the engine plan by them.

    Raises:
        Exception: whatever a compilation raises; the engine keeps its ladder then.
    """
    prepare(engine, ladder)
    engine.adopt(ladder)


def prepare(engine: Refinable, ladder: Ladder) -> None:
    """Compile the shapes of a ladder; they stay for as long as it is referred to.

    Raises:
        Exception: whatever a compilation raises.
    """
    engine.allow(ladder)
    for bucket in ladder.buckets:
        engine.compile(bucket)


def sampled(counts: npt.NDArray[np.int64]) -> list[int]:
    """Lengths as they came, `SAMPLE` of them at most."""
    upto = np.cumsum(counts)
    places = np.linspace(0, upto[-1], min(SAMPLE, int(upto[-1])), endpoint=False)
    return [int(length) for length in np.searchsorted(upto, places, side="right")]


def alone(ladder: Ladder, lengths: Sequence[int], cost: Cost) -> float:
    """Seconds of inputs that run one at a time."""
    least = {length: min(map(cost.of, ladder.fitting(length))) for length in set(lengths)}
    return sum(least[length] for length in lengths)


def together(ladder: Ladder, lengths: Sequence[int], cost: Cost) -> float:
    """Seconds of inputs that are planned together."""
    return sum(cost.of(plan.bucket) for plan in ladder.plan(lengths))
