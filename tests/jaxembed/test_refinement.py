"""Shapes by what comes, on a real engine: the choice, the swap, and what stays as it was."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxembed import Bucket, Embedder, Ladder, make_mesh
from jaxembed.cost import LEAST_CALL, Cost
from jaxembed.engine import Engine
from jaxembed.errors import BucketError
from jaxembed.loading import load
from jaxembed.packing import Row, full, pack
from jaxembed.refinement import Histogram, refine, wide
from jaxembed.runner import Runner
from jaxembed.types import Output
from jaxembed.warmup import use_cache

COST = Cost(call=0.003, token=4e-5, place=1e-5, pair=5e-8)


def taking(cost: Cost) -> Callable[..., float]:
    """`Engine.time` of an engine whose batches cost that."""
    return lambda bucket, *, filled: cost.spent(bucket, bucket.flat if filled else 0)


def test_a_histogram_counts() -> None:
    """By length, from any number of calls."""
    seen = Histogram(5)
    seen.add([1, 5, 5])
    seen.add(iter([0]))
    seen.add([])
    np.testing.assert_array_equal(seen.counts, [1, 1, 0, 0, 0, 2])


def test_a_real_engine_changes_its_ladder(tiny_folder: str) -> None:
    """The vectors stay what they were, what was planned before still runs, and less is padded."""
    embedder = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1]), max_batch_tokens=128)
    texts = ["a b c"] * 50 + ["a b c d e f g h"] * 30 + ["a " * 25]
    before = embedder.encode(texts)
    engine, old = embedder.engine, embedder.engine.ladder
    encodings = embedder.tokenizer.encode_texts(texts)
    planned = pack(old.buckets[0], [Row(encodings[0], 16, False, 0)])
    # This model takes microseconds, in which no length counts for more than another.
    engine.time = taking(COST)
    new = embedder.refine(texts)
    assert engine.ladder is new is not old
    assert {bucket.seq_len for bucket in new.buckets if not bucket.flat} == {6, 10, 32}
    assert any(bucket.flat for bucket in new.buckets)
    assert set(new.buckets) <= engine.compiled
    np.testing.assert_allclose(embedder.encode(texts), before, atol=1e-6)
    np.testing.assert_allclose(engine.run(planned)[0], before[0], atol=1e-6)
    assert embedder.refine(texts) is new


@pytest.mark.parametrize(("multiple", "lengths"), [(1, {6, 10, 16, 32}), (4, {8, 12, 16, 32}), (16, {16, 32})])
def test_several_devices_refine_padded_shapes(tiny_folder: str, multiple: int, lengths: set[int]) -> None:
    """Rows in one line do not divide over devices; and lengths are those that the devices are good at."""
    embedder = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:2]), max_batch_tokens=64)
    texts = ["a b c"] * 50 + ["a b c d e f g h"] * 30
    before = embedder.encode(texts)
    embedder.engine.time = taking(COST)
    embedder.engine.length_multiple = multiple
    new = embedder.refine(texts)
    assert not any(bucket.flat or bucket.batch_size % 2 for bucket in new.buckets)
    assert {bucket.seq_len for bucket in new.buckets} == lengths
    np.testing.assert_allclose(embedder.encode(texts), before, atol=1e-6)


@pytest.mark.parametrize("cost", [COST, COST._replace(place=0.0, pair=0.0)])
def test_planning_goes_by_what_was_measured(tiny_folder: str, cost: Cost) -> None:
    """Prices are those of the fit; where places cost nothing, a few shapes take rows of any length."""
    engine = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1])).engine
    engine.time = taking(cost)
    # What is chosen is the question, and no shape need be compiled for that.
    engine.compile = engine.adopt = lambda _: None
    counts = np.zeros(33, np.int64)
    counts[6], counts[27] = 50, 20
    new = refine(engine, counts)
    assert new is not None
    np.testing.assert_allclose(new.prices, cost.in_tokens, rtol=1e-6, atol=1e-12)
    several = [bucket for bucket in new.buckets if bucket.batch_size > 1]
    assert all(bucket.seq_len == min(bucket.tokens, 32) for bucket in several) is (cost is not COST)


def counting(folder: str, own: Cost, call: float, real: float) -> Engine:
    """An engine that counts tokens: empty batches cost what is its own, full ones a call and their tokens beside."""
    engine = Embedder.from_pretrained(folder, mesh=make_mesh(jax.devices()[:1])).engine

    def time(bucket: Bucket, *, filled: bool) -> float:
        return own.of(bucket) + (call - own.call + real * bucket.tokens if filled else 0.0)

    engine.counted, engine.time = True, time
    engine.compile = engine.adopt = lambda _: None
    engine.ladder = Ladder.default(max_length=32, max_batch_tokens=512, flat=True, counted=True)
    return engine


def test_where_tokens_are_counted_a_few_shapes_will_do(tiny_folder: str) -> None:
    """What a shape costs is told by empty batches, what a call and a token cost by full ones."""
    own, call, real = Cost(call=3e-4, token=2e-6, place=1e-6, pair=0.0), 1.4e-3, 1.6e-4
    engine = counting(tiny_folder, own, call, real)
    counts = np.zeros(33, np.int64)
    counts[6], counts[27] = 50, 20
    new = refine(engine, counts)
    assert new is not None and len(new) < len(engine.ladder) and all(bucket.flat for bucket in new.buckets)
    expected = own._replace(call=call, real=real).in_tokens
    np.testing.assert_allclose(new.prices, expected, rtol=1e-6, atol=1e-12)
    engine.ladder = new
    assert refine(engine, counts) is None


def test_a_call_costs_something_whatever_was_timed(tiny_folder: str) -> None:
    """Beside other work it may seem free; one row a batch is not chosen then."""
    engine = counting(tiny_folder, Cost(call=1e-9, token=0.0, place=0.0, pair=0.0), 0.0, 1.6e-4)
    counts = np.zeros(33, np.int64)
    counts[6] = 50
    new = refine(engine, counts)
    assert new is not None and new.prices.call == pytest.approx(LEAST_CALL)
    assert new.fullest.batch_size >= 512 // 6 and new.fullest.tokens == 512


def test_what_saves_nothing_is_not_compiled(tiny_folder: str) -> None:
    """Where the shapes there are do as well, whether inputs run one at a time or together."""
    embedder = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1]))
    engine = embedder.engine
    for bucket in engine.ladder.buckets:
        engine.compile(bucket)
    engine.time = taking(COST)
    counts = np.zeros(33, np.int64)
    counts[32] = 1000
    old = refine(engine, counts)
    assert old is not None and {bucket.seq_len for bucket in old.buckets} == {16, 32}
    compiled = engine.compiled
    assert refine(engine, counts) is None
    assert engine.ladder is old and engine.compiled == compiled == set(old.buckets)


def test_shapes_can_be_made_ready_elsewhere_first(tiny_folder: str) -> None:
    """Before any of them is compiled: first the one that is timed beside those that there are, then the chosen ones."""
    embedder = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1]), max_batch_tokens=64)
    engine = embedder.engine
    for bucket in engine.ladder.buckets:
        engine.compile(bucket)
    engine.time = taking(COST)
    counts = np.zeros(33, np.int64)
    counts[[5, 20]] = 1000
    told: list[tuple[frozenset[Bucket], frozenset[Bucket]]] = []
    new = refine(engine, counts, lambda ladder: told.append((frozenset(ladder.buckets), engine.compiled)))
    assert new is not None
    (timed, before), (wanted, compiled) = told
    assert timed - before == {wide(engine)} and timed <= compiled
    assert wanted - compiled and set(new.buckets) <= wanted | compiled
    assert refine(engine, counts, lambda ladder: told.append((frozenset(), frozenset()))) is None
    assert len(told) == 3


def test_a_small_shape_that_proves_slow_is_left_out(tiny_folder: str) -> None:
    """What the fit cannot tell, as that one row of 10 tokens takes longer than one of 16, is measured."""
    embedder = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1]))
    engine = embedder.engine
    engine.time = lambda bucket, *, filled: COST.of(bucket) * (1.5 if bucket == Bucket(1, 10) else 1.0)
    new = embedder.refine(["a b c d e f g h"] * 50)
    assert Bucket(1, 10) not in new.buckets
    assert {Bucket(1, 16), Bucket(13, 10, 128), Bucket(51, 10)} <= set(new.buckets)
    assert set(new.buckets) <= engine.compiled


def test_shapes_that_nobody_plans_by_are_dropped(tiny_folder: str) -> None:
    """A batch that was planned by the ladder before still runs, for as long as that ladder is referred to."""
    embedder = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1]), max_batch_tokens=128)
    engine, old = embedder.engine, embedder.engine.ladder
    for bucket in old.buckets:
        engine.compile(bucket)
    new = Ladder([old.buckets[0], Bucket(2, 32)])
    with pytest.raises(BucketError, match="not on the ladder"):
        engine.compile(Bucket(2, 32))
    engine.allow(new)
    engine.compile(Bucket(2, 32))
    engine.adopt(new)
    assert engine.compiled == {*old.buckets, *new.buckets}
    assert engine.run(full(old.buckets[-1])).shape == (old.buckets[-1].batch_size, 16)
    left = old.buckets[-1]
    del old
    assert engine.compiled == set(new.buckets)
    with pytest.raises(BucketError, match="not on the ladder"):
        engine.run(full(left))
    assert engine.run(full(new.buckets[0])).shape == (1, 16)


def test_a_call_under_way_keeps_its_shapes(tiny_folder: str) -> None:
    """Vectors that are still being fetched from an iterator do not notice a swap of the ladder."""
    embedder = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1]), max_batch_tokens=64)
    texts = ["a b c", "a " * 25, "a b c d e f g h"] * 5
    want = embedder.encode(texts)
    engine = embedder.engine
    runner = Runner(embedder.model, embedder.tokenizer, engine)
    unit = embedder.model.checkpoint.normalize
    rows = runner.run(Output.DENSE, texts, embedder.tokenizer.encode_texts, dimensions=16, normalize=unit)
    got = [next(rows)]
    engine.allow(new := Ladder([Bucket(1, 32)]))
    engine.compile(Bucket(1, 32))
    engine.adopt(new)
    got.extend(rows)
    vectors = np.empty_like(want)
    for one in got:
        vectors[one.items] = one.rows
    np.testing.assert_array_equal(vectors, want)
    assert engine.compiled == {Bucket(1, 32)}


def test_what_was_chosen_is_kept(tiny_folder: str, cache: Path) -> None:
    """For an engine of the same model and batch size, and for no other."""

    def engine(tokens: int = 128, dtype: str = "float32") -> Engine:
        model = load(tiny_folder, mesh=make_mesh(jax.devices()[:1]), dtype=dtype)
        return Engine(model, max_batch_tokens=tokens)

    first = engine()
    assert first.kept() is None
    chosen = Ladder([Bucket(2, 8), Bucket(1, 32)], COST.in_tokens)
    first.keep(chosen)
    kept = engine().kept()
    assert kept is not None and kept.buckets == (Bucket(2, 8), Bucket(1, 32)) and kept.prices == chosen.prices
    assert engine(tokens=64).kept() is None
    assert engine(dtype="bfloat16").kept() is None
    use_cache(None)
    first.keep(kept)
    assert first.kept() is None


def test_what_is_not_compiled_is_not_adopted(tiny_folder: str) -> None:
    """Nor does a shape compile that does not divide over the devices."""
    embedder = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:2]))
    engine, old = embedder.engine, embedder.engine.ladder
    with pytest.raises(BucketError, match="3x8 does not divide over 2 devices"):
        engine.allow(Ladder([Bucket(3, 8)]))
    engine.allow(Ladder([Bucket(2, 8)]))
    with pytest.raises(BucketError, match="2x8 is on the ladder but was not compiled"):
        engine.adopt(Ladder([Bucket(2, 8)]))
    assert engine.ladder is old


def test_a_failure_leaves_the_old_ladder(tiny_folder: str) -> None:
    """A shape that does not compile raises, and nothing was swapped."""
    embedder = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1]))
    engine, old = embedder.engine, embedder.engine.ladder
    engine.time = taking(COST)

    def fail(bucket: Bucket) -> None:
        if bucket not in {*old.buckets, wide(engine)}:
            raise RuntimeError(f"no {bucket}")

    engine.compile = fail
    counts = np.zeros(33, np.int64)
    counts[5] = 100
    with pytest.raises(RuntimeError, match="no 1x6"):
        refine(engine, counts)
    assert engine.ladder is old
