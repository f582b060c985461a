"""The ladder: smallest fit, the default shapes, and plans that are proven cheapest against every other plan."""

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.buckets import Ladder
from jaxembed.cost import PRICES, Cost
from jaxembed.errors import BucketError
from jaxembed.shapes import rungs
from jaxembed.types import Bucket

buckets = st.builds(Bucket, st.integers(1, 9), st.integers(1, 40), st.just(0))
ladders = st.lists(buckets, min_size=1, max_size=8)
flat_buckets = buckets.flatmap(lambda b: st.builds(Bucket, *map(st.just, b[:2]), st.integers(b.seq_len, b.places)))
mixed_ladders = st.lists(buckets | flat_buckets, min_size=1, max_size=8)


@st.composite
def queues(
    draw: st.DrawFn, most: int = 30, shapes: st.SearchStrategy[list[Bucket]] = mixed_ladders
) -> tuple[list[Bucket], list[int]]:
    """The buckets of a ladder and the lengths of items that fit it."""
    shapes = draw(shapes)
    return shapes, draw(st.lists(st.integers(0, max(b.seq_len for b in shapes)), max_size=most))


def takes(bucket: Bucket, lengths: Sequence[int]) -> bool:
    """Whether a batch of this shape holds rows of these lengths."""
    return bucket.batch_size >= len(lengths) and bucket.seq_len >= max(lengths) and bucket.tokens >= sum(lengths)


def cheapest(ladder: Ladder, lengths: Sequence[int]) -> float | None:
    """Cost of the cheapest single batch for these rows, None where none takes them."""
    return min((PRICES.of(b) for b in ladder.buckets if takes(b, lengths)), default=None)


def price_of(ladder: Ladder, lengths: Sequence[int]) -> float:
    """What a plan costs."""
    return sum(PRICES.of(plan.bucket) for plan in ladder.plan(lengths))


def optimum(ladder: Ladder, lengths: Sequence[int]) -> float:
    """The least cost over every partition of the items, in runs or not."""

    @cache
    def best(left: frozenset[int]) -> float:
        if not left:
            return 0.0
        first, *others = sorted(left)
        found = []
        for chosen in range(2 ** len(others)):
            group = [first, *(item for i, item in enumerate(others) if chosen >> i & 1)]
            cost = cheapest(ladder, [lengths[item] for item in group])
            if cost is not None:
                found.append(cost + best(left - frozenset(group)))
        return min(found)

    return best(frozenset(range(len(lengths))))


@given(queues())
def test_a_plan_places_every_item_once_where_it_fits(queue: tuple[list[Bucket], list[int]]) -> None:
    """The items partition the queue; no batch is overfull, no row too long, and its longest rows come first."""
    ladder, lengths = Ladder(queue[0]), queue[1]
    plans = ladder.plan(lengths)
    placed = [item for plan in plans for item in plan.items]
    assert sorted(placed) == list(range(len(lengths)))
    if not any(bucket.flat for bucket in ladder.buckets):
        assert [lengths[item] for item in placed] == sorted(lengths, reverse=True)
    for plan in plans:
        assert [lengths[item] for item in plan.items] == sorted((lengths[item] for item in plan.items), reverse=True)
        assert plan.bucket in ladder.buckets
        assert 1 <= len(plan.items) <= plan.bucket.batch_size
        assert all(lengths[item] <= plan.bucket.seq_len for item in plan.items)
        assert sum(lengths[item] for item in plan.items) <= plan.bucket.tokens


@given(queues())
def test_a_plan_costs_at_most_one_dispatch_per_row(queue: tuple[list[Bucket], list[int]]) -> None:
    """Batching never costs more than not batching."""
    ladder, lengths = Ladder(queue[0]), queue[1]
    cost = price_of(ladder, lengths)
    alone = [cheapest(ladder, [length]) for length in lengths]
    assert cost <= sum(price for price in alone if price is not None)


@given(queues(most=6, shapes=ladders))
def test_a_plan_is_the_cheapest_there_is(queue: tuple[list[Bucket], list[int]]) -> None:
    """Of padded shapes: equal in cost to the best of all partitions, found by trying them all."""
    ladder, lengths = Ladder(queue[0]), queue[1]
    assert price_of(ladder, lengths) == optimum(ladder, lengths)


@given(queues(most=10))
def test_no_cutting_into_runs_is_cheaper(queue: tuple[list[Bucket], list[int]]) -> None:
    """Runs are as dear as the best cutting of the rows in the order of their lengths; a plan is those or cheaper."""
    ladder, lengths = Ladder(queue[0]), sorted(queue[1], reverse=True)
    best = [0.0] * (len(lengths) + 1)
    for i in range(len(lengths) - 1, -1, -1):
        runs = ((cheapest(ladder, lengths[i:end]), end) for end in range(i + 1, len(lengths) + 1))
        best[i] = min(cost + best[end] for cost, end in runs if cost is not None)
    runs = sum(PRICES.of(plan.bucket) for plan in ladder._in_runs(lengths, range(len(lengths))))
    assert runs == pytest.approx(best[0])
    cost = price_of(ladder, lengths)
    assert cost <= runs
    if not any(bucket.flat for bucket in ladder.buckets):
        assert cost == runs


@given(st.lists(st.integers(0, 40), max_size=7), st.integers(40, 120))
def test_where_only_tokens_cost_batches_are_nearly_the_fewest(lengths: list[int], room: int) -> None:
    """As first-fit decreasing promises (https://doi.org/10.1007/978-3-540-74450-4_1): 11 / 9 of them and 2 / 3."""
    ladder = Ladder([Bucket(7, 40, room)])
    fewest = optimum(ladder, lengths) / PRICES.of(ladder.buckets[0])
    assert len(ladder.plan(lengths)) <= 11 / 9 * fewest + 2 / 3


def test_rows_of_all_lengths_fill_a_batch_by_hand() -> None:
    """Two long ones leave room that short ones fill; where runs do as well they are taken."""
    ladder = Ladder([Bucket(16, 40, 100), Bucket(4, 16, 32)], Cost(call=2.0, token=1.0, place=0.0, pair=0.0))
    assert ladder.plan([40, 40, 30, 30, 20, 10, 10, 10, 8]) == [
        (Bucket(16, 40, 100), (1, 0, 4)),
        (Bucket(16, 40, 100), (3, 2, 7, 6, 5, 8)),
    ]
    assert ladder.plan([40, 40, 20, 15]) == [(Bucket(16, 40, 100), (0, 1, 2)), (Bucket(4, 16, 32), (3,))]


@given(queues().filter(lambda queue: bool(queue[1])), st.sampled_from([0, 16, 4096]))
def test_the_first_batch_does_the_most_for_its_cost(queue: tuple[list[Bucket], list[int]], price: int) -> None:
    """Of every shape with those rows nearest in length to the first one that fit; that one is always in it."""
    ladder, lengths = Ladder(queue[0]), queue[1]
    ladder.prices = prices = PRICES._replace(call=price)
    nearest = sorted(range(1, len(lengths)), key=lambda i: abs(lengths[i] - lengths[0]))
    rates = {}
    for bucket in ladder.buckets:
        if bucket.seq_len >= lengths[0]:
            real = lengths[0]
            rows = 1
            for i in nearest:
                if rows < bucket.batch_size and lengths[i] <= bucket.seq_len and real + lengths[i] <= bucket.tokens:
                    rows, real = rows + 1, real + lengths[i]
            rates[bucket] = real / prices.of(bucket)
    plan = ladder.first_batch(lengths)
    assert plan.items[0] == 0
    assert len(set(plan.items)) == len(plan.items) <= plan.bucket.batch_size
    assert takes(plan.bucket, [lengths[i] for i in plan.items])
    assert sum(lengths[i] for i in plan.items) / prices.of(plan.bucket) == max(rates.values())


def test_the_first_batch_of_too_long_a_row_is_refused() -> None:
    """Others that no shape takes any more only wait."""
    ladder = Ladder([Bucket(2, 8)])
    assert ladder.first_batch([8, 9, 3]) == (Bucket(2, 8), (0, 2))
    with pytest.raises(BucketError, match="9 tokens fits no bucket"):
        ladder.first_batch([9, 8])


def test_the_first_batch_of_a_row_without_tokens() -> None:
    """As an empty text is for a model without special tokens."""
    assert Ladder([Bucket(1, 8), Bucket(4, 16)]).first_batch([0]) == (Bucket(1, 8), (0,))


def test_a_dear_dispatch_makes_fuller_batches() -> None:
    """Where a dispatch costs as much as many tokens, as on an accelerator, one padded batch is better than two."""
    ladder = Ladder([Bucket(4, 16), Bucket(16, 16)])
    lengths = [16] * 8
    assert [plan.bucket for plan in ladder.plan(lengths)] == [Bucket(4, 16)] * 2
    assert ladder.first_batch(lengths).bucket == Bucket(4, 16)
    ladder.prices = PRICES._replace(call=4096)
    assert [plan.bucket for plan in ladder.plan(lengths)] == [Bucket(16, 16)]
    assert ladder.first_batch(lengths).bucket == Bucket(16, 16)


def test_planning_is_worked_out_by_hand() -> None:
    """Short rows share a short batch; the long one does not drag them to its length."""
    ladder = Ladder([Bucket(1, 64), Bucket(4, 16)])
    plans = ladder.plan([5, 60, 7, 16])
    assert [(plan.bucket, plan.items) for plan in plans] == [(Bucket(1, 64), (1,)), (Bucket(4, 16), (3, 2, 0))]
    assert ladder.plan([]) == []


def test_an_item_longer_than_the_ladder_is_refused() -> None:
    """The error names the length and the ladder."""
    with pytest.raises(BucketError, match=r"17 tokens fits no bucket of the ladder \{1x8, 1x16\}"):
        Ladder([Bucket(1, 16), Bucket(1, 8)]).plan([3, 17])


@given(mixed_ladders, st.integers(0, 40))
def test_fitting_leaves_out_what_another_shape_does_as_cheaply(shapes: list[Bucket], length: int) -> None:
    """And nothing else; asked twice, the answer is the same."""
    ladder = Ladder(shapes)
    if length > ladder.max_length:
        with pytest.raises(BucketError):
            ladder.fitting(length)
        return

    def holds(bucket: Bucket) -> tuple[int, int, float]:
        return bucket.batch_size, min(bucket.tokens, bucket.batch_size * length), -PRICES.of(bucket)

    def better(one: Bucket, other: Bucket) -> bool:
        return all(a >= b for a, b in zip(holds(one), holds(other), strict=True))

    fits = {bucket for bucket in ladder.buckets if bucket.seq_len >= length}
    for _ in range(2):
        found = ladder.fitting(length)
        assert set(found) <= fits
        assert [bucket.batch_size for bucket in found] == sorted(bucket.batch_size for bucket in found)
        assert all(any(better(one, bucket) for one in found) for bucket in fits)
        assert not any(better(one, other) for one in found for other in found if one != other)


def test_fitting_by_hand() -> None:
    """Of padded shapes the shortest of each batch size."""
    ladder = Ladder([Bucket(1, 8), Bucket(4, 8), Bucket(1, 16), Bucket(4, 16), Bucket(2, 32)])
    assert ladder.fitting(7) == (Bucket(1, 8), Bucket(4, 8))
    assert ladder.fitting(9) == (Bucket(1, 16), Bucket(4, 16))
    assert ladder.fitting(17) == (Bucket(2, 32),)


def test_a_ladder_sorts_and_counts_its_buckets() -> None:
    """Order and repetition do not matter; the bounds are over all buckets, not those of one of them."""
    ladder = Ladder([Bucket(8, 4), Bucket(1, 64), Bucket(2, 32), Bucket(1, 64), Bucket(3, 32)])
    assert ladder.buckets == (Bucket(8, 4), Bucket(2, 32), Bucket(1, 64), Bucket(3, 32))
    assert (len(ladder), ladder.max_length, ladder.batch_tokens, ladder.max_rows) == (4, 64, 96, 8)
    assert str(ladder) == "{8x4, 2x32, 1x64, 3x32}"


def test_a_single_long_row_says_nothing_of_a_batch() -> None:
    """Unless all shapes are of one row."""
    assert Ladder([Bucket(1, 100), Bucket(4, 8), Bucket(1, 8)]).batch_tokens == 32
    assert Ladder([Bucket(1, 100), Bucket(1, 8)]).batch_tokens == 100


@pytest.mark.parametrize(("length", "outsize"), [(168, False), (512, False), (1008, False), (1009, True), (8192, True)])
def test_a_row_is_very_long_beyond_two_batches(length: int, outsize: bool) -> None:
    """One as long as a batch may be, 512 tokens, is not, though the chosen shapes of several rows end at 504."""
    ladder = Ladder([Bucket(3, 168), Bucket(1, 168), Bucket(1, length)])
    assert ladder.outsize(Bucket(1, length)) == outsize
    assert not ladder.outsize(Bucket(3, 168))


@pytest.mark.parametrize(
    "wrong", [[], [Bucket(0, 4)], [Bucket(4, 0)], [Bucket(1, 1), Bucket(-1, 8)], [Bucket(2, 4, 3)], [Bucket(2, 4, 9)]]
)
def test_an_impossible_ladder_is_refused(wrong: list[Bucket]) -> None:
    """No buckets, one without rows or tokens, or a flat one without room for them."""
    with pytest.raises(BucketError, match="at least"):
        Ladder(wrong)


@given(st.integers(1, 9000), st.integers(1, 40_000), st.integers(1, 16))
def test_the_default_ladder_takes_every_length(max_length: int, max_batch_tokens: int, batch_multiple: int) -> None:
    """Every length has a bucket, the longest one exactly; no batch is over the budget but a single row's."""
    ladder = Ladder.default(max_length=max_length, max_batch_tokens=max_batch_tokens, batch_multiple=batch_multiple)
    assert ladder.max_length == max_length
    for bucket in ladder.buckets:
        assert bucket.seq_len <= max_length
        assert bucket.batch_size % batch_multiple == 0
        assert bucket.tokens <= max_batch_tokens or bucket.batch_size == batch_multiple
    for length in {1, max_length // 2, max_length}:
        assert ladder.fitting(length)[0].batch_size == batch_multiple
    for seq_len in {bucket.seq_len for bucket in ladder.buckets}:
        fullest = max(bucket.batch_size for bucket in ladder.buckets if bucket.seq_len == seq_len)
        assert (fullest + batch_multiple) * seq_len > max_batch_tokens, "a taller batch would still be in the budget"


def test_the_default_ladder_by_hand() -> None:
    """Powers of two to the model's length; batches of 1, 4, 16, ... and the fullest."""
    ladder = Ladder.default(max_length=100, max_batch_tokens=512)
    sizes: dict[int, list[int]] = {}
    for bucket in ladder.buckets:
        sizes.setdefault(bucket.seq_len, []).append(bucket.batch_size)
    assert {length: sorted(found) for length, found in sizes.items()} == {
        16: [1, 4, 16, 32],
        32: [1, 4, 16],
        64: [1, 4, 8],
        100: [1, 4, 5],
    }


def test_the_default_flat_ladder_by_hand() -> None:
    """A padded row of each length, flat batches of 512, 128 and 32 tokens, and the longest rows padded."""
    ladder = Ladder.default(max_length=100, max_batch_tokens=512, flat=True)
    assert set(map(str, ladder.buckets)) == {
        *("1x16", "3x16/32", "12x16/128", "48x16/512"),
        *("1x32", "6x32/128", "24x32/512"),
        *("1x64", "3x64/128", "12x64/512"),
        *("1x100", "8x100/512", "5x100"),
    }


@given(st.integers(1, 9000), st.integers(1, 40_000))
def test_the_default_flat_ladder_takes_every_length(max_length: int, max_batch_tokens: int) -> None:
    """As a padded single row, whatever else it takes."""
    ladder = Ladder.default(max_length=max_length, max_batch_tokens=max_batch_tokens, flat=True)
    assert ladder.max_length == max_length
    for length in {1, max_length // 2, max_length}:
        shortest = ladder.fitting(length)[0]
        assert shortest.batch_size == 1 and not shortest.flat
    assert all(bucket.tokens <= max_batch_tokens or bucket.batch_size == 1 for bucket in ladder.buckets)


def test_a_mixed_handful_shares_a_flat_batch() -> None:
    """Where padded nearly half of it would have been padding."""
    padded, flat = [Bucket(1, 16), Bucket(8, 16)], [Bucket(1, 16), Bucket(8, 16, 80)]
    lengths = [16, 4, 12, 8, 15, 6, 10]
    assert sum(plan.bucket.tokens for plan in Ladder(padded).plan(lengths)) == 128
    assert [plan.bucket for plan in Ladder(flat).plan(lengths)] == [Bucket(8, 16, 80)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_length": 0, "max_batch_tokens": 8},
        {"max_length": 8, "max_batch_tokens": 0},
        {"max_length": 8, "max_batch_tokens": 8, "batch_multiple": 0},
        {"max_length": 8, "max_batch_tokens": -1},
    ],
)
def test_impossible_default_ladders_are_refused(arguments: dict[str, int]) -> None:
    """Each number must be at least 1."""
    with pytest.raises(BucketError, match="each must be at least 1"):
        Ladder.default(**arguments)


@pytest.mark.parametrize("max_length", [16, 100, 512, 2000])
def test_where_tokens_are_counted_fewer_shapes_will_do(max_length: int) -> None:
    """None but of very long rows is padded; where places cost nothing, what one batch has room for is one."""
    sizes = {"max_length": max_length, "max_batch_tokens": 512, "flat": True}
    ladder, other = Ladder.default(**sizes, counted=True), Ladder.default(**sizes)
    assert len(ladder) < len(other)
    assert {bucket.seq_len for bucket in ladder.buckets if not bucket.flat} == {n for n in rungs(max_length) if n > 512}
    assert ladder.max_length == max_length
    ladder.prices = ladder.prices._replace(place=0.0, pair=0.0)
    lengths = [min(max_length, 20)] * 10
    assert len(ladder.plan(lengths)) == 1
    assert ladder.first_batch(lengths).items == tuple(range(10))


@pytest.mark.parametrize("max_length", [16, 100, 2000])
def test_where_tokens_are_counted_two_shapes_begin(max_length: int) -> None:
    """The smallest and the longest, and those of longer rows; they cost what they did, and take everything."""
    ladder = Ladder.default(max_length=max_length, max_batch_tokens=512, flat=True, counted=True)
    small = ladder.smallest()
    assert small.prices == ladder.prices and small.max_length == max_length
    assert len([bucket for bucket in small.buckets if bucket.flat]) == (1 if max_length == 16 else 2)
    assert small.buckets[0] == ladder.buckets[0]
    assert all(small.fitting(length) for length in rungs(max_length))


def test_the_smallest_shapes_take_whatever_the_ladder_takes() -> None:
    """One of each length, the one with the fewest rows."""
    ladder = Ladder([Bucket(1, 8), Bucket(4, 8), Bucket(2, 16), Bucket(8, 16), Bucket(4, 32)])
    assert ladder.smallest().buckets == (Bucket(1, 8), Bucket(2, 16), Bucket(4, 32))
