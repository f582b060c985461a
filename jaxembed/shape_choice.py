"""Which shapes to compile for the lengths that came. Knows no JAX.

First many shapes that might do: lengths by exact dynamic programming over the histogram, and of each length some sizes.
Then those that save least are left out, one after the other, until each that is left saves its price.
"""

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxembed.buckets import Ladder
from jaxembed.cost import Cost
from jaxembed.shapes import MEAN, flat_shape, flat_shapes, rungs, single
from jaxembed.types import Bucket

__all__ = ["PRICE", "choose_lengths", "compared", "fewest", "flat_choices", "loads", "mean_length", "spent"]

WORTH = 0.01
"""A further length must save this share of the whole cost: each is several shapes to compile."""

FLAT_WORTH = 0.05
"""The same of flat shapes, of each of whose lengths there are more."""

PRICE = 0.004
"""A shape must save this share of what inputs take, in the mean over `loads`: it is compiled, and held in memory."""

OTHERS = 0.1
"""The share of that which texts of other lengths than came are reckoned to have, spread evenly over `shapes.rungs`."""

SIZES = (1, 3 / 4, 1 / 2, 3 / 8, 1 / 4, 3 / 16, 1 / 8, 3 / 32, 1 / 16, 1 / 32)
"""Tokens of flat shapes, in parts of the largest one's."""

LEAST = 16
"""A flat shape has at least so many."""

SHORT = 0.05
"""Where places cost little, there is room for rows of which so many, in parts of all, are no longer."""

GROUPS = (1, 4, 12, 32)
"""How many inputs are planned together, from a query alone to a list of texts; and as many as fill some batches."""

SAMPLE = 288
"""Inputs that are reckoned in groups, which divide it; at least so many where all are planned together."""

MOST = 2048
"""At most so many there: they are planned some hundred times."""

FILLED = 32
"""Batches that all of them fill."""

JOB = 2.0
"""All of them count as much as so many loads of groups: most of what a device ever computes is large jobs."""

Counts = npt.NDArray[np.int64]
"""int64 [max_length + 1]: inputs of each length from 0 on."""

Seconds = Callable[[Bucket, int], float]
"""What one batch of a shape takes, with so many tokens in it."""

Group = tuple[int, ...]
"""Lengths of inputs that are planned together."""


class Load(NamedTuple):
    """Inputs in groups of one size.

    Attributes:
        came: group -> how often.
        others: groups of texts of other lengths, each of one.
        weight: how much they count beside others.
    """

    came: Mapping[Group, int]
    others: Sequence[Group]
    weight: float = 1.0


class Planned(NamedTuple):
    """What a group takes, and in which shapes."""

    seconds: float
    buckets: frozenset[Bucket]


def choose_lengths(
    counts: Counts, cost: Callable[[int], float], *, fixed: float = 0.0, worth: float = WORTH, multiple: int = 1
) -> tuple[int, ...]:
    """The lengths l_1 < ... < l_k that cost least, where an input runs at the shortest of them that takes it.

    Exact over the candidates (multiples of 2 from 4 to 32, of 4 up to 64, of 8 up to 256, of 16 above): F[j] = min over
    i < j of F[i] + cost(l_j) * (inputs longer than l_i and up to l_j) + price.

    Args:
        counts: int64 [max_length + 1], inputs of each length. The greatest length is always among the chosen.
        cost: of one row of a length; rises with it.
        fixed: what all inputs cost beside that, whatever the lengths.
        worth: a further length must save this share of the whole cost.
        multiple: of which the others are multiples.
    """
    longest = len(counts) - 1
    steps = (*range(4, 32, 2), *range(32, 64, 4), *range(64, 256, 8), *range(256, longest, 16))
    candidates = [*(n for n in steps if n < longest and n % multiple == 0), longest]
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


def flat_choices(counts: Counts, cost: Cost, max_batch_tokens: int, *, counted: bool) -> list[Bucket]:
    """The shapes that inputs cost least in, where there are flat ones.

    Single rows are padded, and so are full batches of rows that are alike, as out of a large job: of these there are
    shapes of many lengths. What happened to come together is of all lengths: for that there are flat shapes, of few
    lengths, since only attention pads, but of many sizes. And of each size there is one for rows of any number and
    length, which is all that is needed where not even attention pads. Where tokens are counted padded shapes are only
    for what no batch of several rows holds.

    Args:
        counts: int64 [max_length + 1], inputs of each length.
        cost: of shapes.
        max_batch_tokens: of the largest shapes of several rows.
        counted: whether the tokens that there are are counted.
    """
    shapes = []
    for length in choose_lengths(counts, cost.of_row):
        shapes.append(single(length, max_batch_tokens, counted=counted))
        if not counted:
            shapes.append(Bucket(max(1, max_batch_tokens // length), length))
    sizes = [size for part in SIZES if (size := int(max_batch_tokens * part)) >= LEAST]
    fixed = (cost.token + cost.real) * float(np.dot(counts, np.arange(len(counts))))
    before = -1
    for length in choose_lengths(counts, cost.of_places, fixed=fixed, worth=FLAT_WORTH):
        mean = mean_length(counts, before + 1, length) or MEAN * length
        shapes += flat_shapes(length, sizes, mean, counted=counted)
        before = length
    longest, short = len(counts) - 1, max(1, sampled(counts, round(0.5 / SHORT))[0])
    for size in sizes:
        shapes.append(flat_shape(math.ceil(size / short), min(size, longest), size, counted=counted))
    return shapes


def mean_length(counts: Counts, shortest: int, longest: int) -> float:
    """Mean length of the inputs between two lengths; 0 if there are none."""
    came = counts[shortest : longest + 1]
    return float(np.dot(came, np.arange(shortest, longest + 1))) / came.sum() if came.any() else 0.0


def loads(counts: Counts, batch_tokens: int) -> list[Load]:
    """Inputs like those that came, in groups of each size of `GROUPS`, and all at once.

    Args:
        counts: int64 [max_length + 1], inputs of each length; at least one.
        batch_tokens: of a full batch.
    """

    def filling(length: float) -> int:
        return int(min(MOST, FILLED * batch_tokens / max(1.0, length)))

    lengths = rungs(len(counts) - 1)
    every = sampled(counts, max(SAMPLE, filling(mean_length(counts, 0, len(counts) - 1))))
    few = sampled(counts, SAMPLE)
    # Of those that stand side by side lengths must not be alike.
    np.random.default_rng(0).shuffle(few)
    found = [
        Load(
            Counter(tuple(sorted(few[i : i + size])) for i in range(0, SAMPLE, size)),
            [(length,) * size for length in lengths],
        )
        for size in GROUPS
    ]
    return [*found, Load({tuple(every): 1}, [(length,) * max(1, filling(float(length))) for length in lengths], JOB)]


def sampled(counts: Counts, number: int) -> list[int]:
    """So many lengths, distributed as those that came."""
    upto = np.cumsum(counts)
    places = (np.arange(number) + 0.5) * upto[-1] / number
    return [int(length) for length in np.searchsorted(upto, places, side="right")]


def spent(ladder: Ladder, load: Load, seconds: Seconds) -> float:
    """Seconds of the inputs that came."""
    return sum(times * planned(ladder, group, seconds).seconds for group, times in load.came.items())


def compared(ladder: Ladder, other: Ladder, wanted: Sequence[Load], seconds: Seconds) -> float:
    """What the inputs that came take by a ladder, in parts of what they take by another; the mean over loads."""
    parts = [spent(ladder, load, seconds) / spent(other, load, seconds) for load in wanted]
    return float(np.average(parts, weights=[load.weight for load in wanted]))


def planned(ladder: Ladder, group: Group, seconds: Seconds) -> Planned:
    """A group by the plan of a ladder."""
    plans = ladder.plan(group)
    total = sum(seconds(plan.bucket, sum(group[item] for item in plan.items)) for plan in plans)
    return Planned(total, frozenset(plan.bucket for plan in plans))


def fewest(ladder: Ladder, wanted: Sequence[Load], seconds: Seconds) -> Ladder:
    """The shapes of a ladder less those that do not save their `PRICE`, the least useful left out first.

    Args:
        ladder: shapes to choose from. One of the greatest length always stays.
        wanted: what they are for.
        seconds: of a batch.
    """
    now: dict[Group, Planned] = {}
    weights: defaultdict[Group, float] = defaultdict(float)
    all_weights = sum(load.weight for load in wanted)
    for load in wanted:
        share = load.weight / all_weights
        now |= {group: planned(ladder, group, seconds) for group in (*load.came, *load.others)}
        total = sum(times * now[group].seconds for group, times in load.came.items())
        for group, times in load.came.items():
            weights[group] += share * (1 - OTHERS) * times / total
        for group in load.others:
            weights[group] += share * OTHERS / len(load.others) / now[group].seconds
    before = len(ladder) + 1
    while len(ladder) < before:
        before = len(ladder)
        ladder, now = fewer(ladder, now, weights, seconds)
    return ladder


def fewer(
    ladder: Ladder, now: dict[Group, Planned], weights: Mapping[Group, float], seconds: Seconds
) -> tuple[Ladder, dict[Group, Planned]]:
    """Some steps of `fewest`: while a shape is left out that saves least, what others save seldom falls.

    So only the least of all savings is reckoned anew before each step; once no step is left, it may still have fallen
    for others.
    """
    queue = [(-math.inf, 0, bucket) for bucket in ladder.buckets]
    steps = 0
    while queue:
        saving, reckoned, bucket = heapq.heappop(queue)
        if reckoned == steps and saving > PRICE:
            break
        left = [one for one in ladder.buckets if one != bucket]
        if all(one.seq_len < ladder.max_length for one in left):
            continue
        rest = ladder.having(left)
        # Without it, groups that have no batch of it may fill another shape.
        every = bucket == ladder.fullest
        changed = {group: planned(rest, group, seconds) for group, one in now.items() if every or bucket in one.buckets}
        saving = sum(weights[group] * (one.seconds - now[group].seconds) for group, one in changed.items())
        if saving > PRICE or (queue and saving > queue[0][0]):
            heapq.heappush(queue, (saving, steps, bucket))
            continue
        ladder, now = rest, now | changed
        steps += 1
    return ladder, now
