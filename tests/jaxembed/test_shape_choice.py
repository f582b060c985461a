"""The choice of shapes: lengths against every other choice, and what each shape that is left saves."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest

from jaxembed import Bucket, Ladder
from jaxembed.cost import Cost
from jaxembed.shape_choice import (
    FLAT_WORTH,
    GROUPS,
    JOB,
    MOST,
    OTHERS,
    PRICE,
    SAMPLE,
    WORTH,
    Load,
    choose_lengths,
    compared,
    fewest,
    flat_choices,
    loads,
    mean_length,
    spent,
)
from jaxembed.shapes import rungs

COST = Cost(call=0.003, token=4e-5, place=1e-5, pair=5e-8)


def total(chosen: Sequence[int], counts: np.ndarray, price: float) -> float:
    """What a choice of lengths costs, by the definition."""
    rows = sum(
        count * COST.of_row(next(n for n in chosen if n >= length)) for length, count in enumerate(counts) if count
    )
    return rows + price * len(chosen)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_costs_less(seed: int) -> None:
    """Every subset of the candidates up to 24 was tried."""
    random = np.random.default_rng(seed)
    counts = np.zeros(25, np.int64)
    counts[1:] = random.integers(0, 60, 24) * (random.random(24) < 0.5)
    candidates = [*range(4, 24, 2), 24]
    price = WORTH * total(candidates, counts, 0.0)
    choices = [(*some, 24) for size in range(len(candidates)) for some in itertools.combinations(candidates[:-1], size)]
    least = min(total(choice, counts, price) for choice in choices)
    assert total(choose_lengths(counts, COST.of_row), counts, price) == pytest.approx(least, rel=1e-12)


def test_the_greatest_length_is_always_there() -> None:
    """An input of any length that was allowed before still is."""
    counts = np.zeros(301, np.int64)
    assert choose_lengths(counts, COST.of_row)[-1] == 300
    counts[10] = 1000
    assert choose_lengths(counts, COST.of_row) == (10, 300)
    # And where the others are multiples, it need be none.
    assert choose_lengths(counts, COST.of_row, multiple=16) == (16, 300)


def test_flat_shapes_have_room_for_rows_of_the_mean_length() -> None:
    """Of the inputs between two lengths, or for the shortest ones of any; single rows and full batches are padded."""
    counts = np.zeros(65, np.int64)
    counts[[6, 8, 13, 16]] = 100
    counts[[40, 64]] = 20
    found = flat_choices(counts, COST, 256, counted=False)
    sizes = (16, 24, 32, 48, 64, 96, 128, 192, 256)
    wanted = {Bucket(math.ceil(size / 6), min(size, 64), size) for size in sizes}
    before = -1
    fixed = COST.token * float(counts @ np.arange(65))
    for length in choose_lengths(counts, COST.of_places, fixed=fixed, worth=FLAT_WORTH):
        mean = mean_length(counts, before + 1, length)
        assert mean == np.average(np.arange(before + 1, length + 1), weights=counts[before + 1 : length + 1])
        wanted |= {Bucket(math.ceil(size / mean), length, size) for size in sizes if size >= 2 * length}
        before = length
    assert {bucket for bucket in found if bucket.flat} == {bucket for bucket in wanted if bucket.flat < bucket.places}
    padded = [Bucket(rows, length) for length in (8, 16, 64) for rows in (1, 256 // length)]
    assert set(padded) <= set(found)
    assert mean_length(counts, 17, 39) == 0.0


def some(seed: int, longest: int) -> np.ndarray:
    """Counts of lengths up to half the longest."""
    counts = np.zeros(longest + 1, np.int64)
    counts[1 : longest // 2] = np.random.default_rng(seed).integers(0, 50, longest // 2 - 1)
    return counts


def everything(counts: np.ndarray, tokens: int) -> Ladder:
    """The shapes to begin with, and those for what came."""
    default = Ladder.default(max_length=len(counts) - 1, max_batch_tokens=tokens, flat=True)
    return Ladder([*default.buckets, *flat_choices(counts, COST, tokens, counted=False)])


@pytest.mark.parametrize("size", range(len(GROUPS) + 1))
def test_loads_are_inputs_like_those_that_came(size: int) -> None:
    """Of their lengths, as often as they came; and a group of each other length."""
    counts = np.zeros(65, np.int64)
    counts[10], counts[30] = 300, 100
    load = loads(counts, 128)[size]
    lengths = [length for group, times in load.came.items() for _ in range(times) for length in group]
    assert lengths.count(10) == 3 * lengths.count(30) and set(lengths) == {10, 30}
    assert len(lengths) >= SAMPLE
    if size < len(GROUPS):
        assert {len(group) for group in (*load.came, *load.others)} == {GROUPS[size]}
    else:
        # Enough for many batches, of whatever length.
        assert min(sum(group) for group in (*load.came, *load.others)) >= 32 * 128
    assert [set(group) for group in load.others] == [{length} for length in rungs(64)]


def test_large_batches_are_not_filled_without_end() -> None:
    """All inputs are planned some hundred times."""
    counts = np.zeros(513, np.int64)
    counts[12] = 10**6
    *_, every = loads(counts, 16384)
    assert {len(group) for group in every.came} == {MOST}
    assert max(map(len, every.others)) == MOST and every.others[-1] == (512,) * 1024


@pytest.mark.parametrize("seed", range(4))
def test_each_shape_that_is_left_saves_its_price(seed: int) -> None:
    """By the definition: the mean of what the loads take more without it, of what they took in all shapes."""
    counts = some(seed, 32)
    noise = np.random.default_rng(seed).uniform(0.8, 1.25, (65, 33, 65))

    def seconds(bucket: Bucket, tokens: int) -> float:
        return COST.of(bucket) * float(noise[bucket])

    wanted, all_of_them = loads(counts, 64), everything(counts, 64)
    found = fewest(all_of_them, wanted, seconds)
    assert set(found.buckets) < set(all_of_them.buckets) and found.max_length == 32

    def taken(ladder: Ladder) -> float:
        parts = []
        for load in wanted:
            other = [Load({group: 1}, []) for group in load.others]
            ratios = [spent(ladder, one, seconds) / spent(all_of_them, one, seconds) for one in (load, *other)]
            parts.append((1 - OTHERS) * ratios[0] + OTHERS * float(np.mean(ratios[1:])))
        return float(np.average(parts, weights=[1.0] * len(GROUPS) + [JOB]))

    for bucket in found.buckets:
        left = [one for one in found.buckets if one != bucket]
        if any(one.seq_len == 32 for one in left):
            assert taken(found.having(left)) - taken(found) > PRICE
    for load in wanted:
        assert spent(found, load, seconds) < 1.15 * spent(all_of_them, load, seconds)


def test_texts_of_lengths_that_did_not_come_are_thought_of() -> None:
    """Queries alone leave shapes in which a long text takes no more than half as long again."""
    counts = np.zeros(257, np.int64)
    counts[4:21] = 100
    before, wanted = everything(counts, 512), loads(counts, 512)
    after = fewest(before, wanted, COST.spent)
    assert len(after) < len(before) / 1.5
    for length in rungs(256):
        alone = Load({(length,): 1}, [])
        assert spent(after, alone, COST.spent) < 1.5 * spent(before, alone, COST.spent)


def test_ladders_are_compared_by_what_came() -> None:
    """Each load in parts of itself, however long it takes; other lengths do not count."""
    short, long = Load({(8,): 3}, [(64,)]), Load({(64,): 1, (8,): 1}, [], weight=3.0)
    old, new = Ladder([Bucket(1, 16), Bucket(1, 64)]), Ladder([Bucket(1, 8), Bucket(1, 64)])
    seconds = {Bucket(1, 8): 1.0, Bucket(1, 16): 2.0, Bucket(1, 64): 6.0}
    assert compared(new, old, [short, long], lambda bucket, tokens: seconds[bucket]) == pytest.approx(
        (1 / 2 + 3 * 7 / 8) / 4
    )


def test_one_shape_is_left_at_least() -> None:
    """Of the greatest length; and batches cost what they did."""
    ladder = Ladder([Bucket(1, 8), Bucket(2, 64)], COST.in_tokens)
    found = fewest(ladder, loads(np.eye(65, dtype=np.int64)[64], 128), COST.spent)
    assert found.buckets == (Bucket(2, 64),) and found.prices == COST.in_tokens
    assert fewest(found, loads(np.eye(65, dtype=np.int64)[3], 128), COST.spent) is found


@pytest.mark.parametrize("lengths", [slice(4, 21), slice(4, 257), slice(200, 257)])
def test_where_tokens_are_counted_a_few_shapes_are_chosen(lengths: slice) -> None:
    """They take rows of any length, and inputs take as good as nothing beside the time of their tokens and calls."""
    cost = Cost(call=1.4e-3, token=2e-6, place=0.0, pair=0.0, real=1.6e-4)
    counts = np.zeros(257, np.int64)
    counts[lengths] = 100
    found = Ladder(flat_choices(counts, cost, 512, counted=True), cost.in_tokens)
    assert all(bucket.flat for bucket in found.buckets)
    wanted = loads(counts, 512)
    chosen = fewest(found, wanted, cost.spent)
    assert 1 <= len(chosen) <= 4 and chosen.batch_tokens == 512
    for load in wanted:
        assert spent(chosen, load, cost.spent) < 1.05 * spent(found, load, cost.spent)
