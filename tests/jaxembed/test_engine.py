"""The engine: only compiled shapes run, and rows of one batch know nothing of each other."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path

import jax
import numpy as np
import pytest
from parity import save_checkpoint, tiny_bert

from jaxembed import Bucket, Embedder, Ladder, make_mesh
from jaxembed.cost import ACCELERATOR_PRICES, PRICES
from jaxembed.engine import MAX_BATCH_TOKENS, Engine
from jaxembed.errors import BucketError
from jaxembed.loading import load
from jaxembed.locks import SharedLock
from jaxembed.model import Model
from jaxembed.packing import Row, full, pack
from jaxembed.tokens import Tokens
from jaxembed.types import Column, Encoding

BUCKET = Bucket(4, 8)


def row(length: int, *, seed: int = 0, dimensions: int = 16, normalize: bool = False, owner: int = 0) -> Row:
    """A row of random token ids."""
    ids = np.random.default_rng([seed, length]).integers(5, 64, length, np.int32)
    return Row(Encoding(ids), dimensions, normalize, owner)


@pytest.fixture(scope="module")
def model(tiny: Embedder) -> Model:
    """The tiny model on one device."""
    return tiny.model


@pytest.fixture(scope="module")
def engine(model: Model) -> Engine:
    """With two buckets ready."""
    engine = Engine(model, Ladder([BUCKET, Bucket(4, 32), Bucket(1, 8)]))
    engine.compile(BUCKET)
    engine.compile(Bucket(4, 32))
    return engine


@pytest.fixture
def compilations(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], int]]:
    """How many compilations JAX has logged since the test began, in any thread."""
    jax.config.update("jax_log_compiles", True)
    with caplog.at_level(logging.WARNING):
        yield lambda: sum(record.getMessage().startswith("Compiling") for record in caplog.records)
    jax.config.update("jax_log_compiles", False)


def test_a_bucket_off_the_ladder_never_compiles(engine: Engine, compilations: Callable[[], int]) -> None:
    """Not when asked to compile, not when asked to run; the error names the shape and the ladder."""
    off = Bucket(2, 8)
    batch = pack(off, [row(3)])
    message = r"the bucket 2x8 is not on the ladder \{1x8, 4x8, 4x32\}"
    for call in (lambda: engine.compile(off), lambda: engine.run(batch)):
        with pytest.raises(BucketError, match=message):
            call()
    assert compilations() == 0
    assert off not in engine.compiled


def test_a_bucket_that_was_not_compiled_never_compiles(engine: Engine, compilations: Callable[[], int]) -> None:
    """On the request path a missing executable is an error, not a pause of seconds."""
    batch = pack(Bucket(1, 8), [row(3)])
    with pytest.raises(BucketError, match=r"1x8 is on the ladder but was not compiled"):
        engine.run(batch)
    assert compilations() == 0
    assert engine.compiled == {BUCKET, Bucket(4, 32)}


def test_running_compiles_nothing(engine: Engine, compilations: Callable[[], int]) -> None:
    """Nor does compiling what is compiled."""
    engine.run(pack(BUCKET, [row(3)]))
    done = engine.compile(BUCKET)
    assert compilations() == 0
    assert (done.bucket, done.cached) == (BUCKET, True)


def test_threads_that_want_the_same_bucket_compile_it_once(model: Model, compilations: Callable[[], int]) -> None:
    """The others wait for the first; this also shows that a compilation is seen where there is one."""
    fresh = Engine(model, Ladder([Bucket(3, 5)]))
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(fresh.compile, [Bucket(3, 5)] * 4))
    assert compilations() == 1
    assert [one.bucket for one in done] == [Bucket(3, 5)] * 4
    assert fresh.compiled == {Bucket(3, 5)}


def test_sizes_and_norms_may_differ_from_row_to_row(engine: Engine) -> None:
    """Each row is cut and normalised by itself; columns behind the cut are 0."""
    wishes = [(16, False), (16, True), (5, False), (5, True)]
    batch = pack(BUCKET, [row(6, dimensions=size, normalize=unit) for size, unit in wishes])
    whole, *_ = got = engine.run(batch)
    for vector, (size, unit) in zip(got, wishes, strict=True):
        expected = np.where(np.arange(16) < size, whole, 0)
        if unit:
            expected = expected / np.linalg.norm(expected)
        np.testing.assert_allclose(vector, expected, atol=1e-6)
    assert np.linalg.norm(whole) != pytest.approx(1, abs=1e-2)


def test_rows_do_not_leak(engine: Engine) -> None:
    """A row's vector does not depend, to the last bit, on what stands in the other rows or behind its end."""
    alone = engine.run(pack(BUCKET, [row(3, seed=1)]))[0]
    for others in ([row(8, seed=2)], [row(8, seed=3), row(1, seed=4), row(8, seed=5)]):
        together = engine.run(pack(BUCKET, [row(3, seed=1), *others]))
        np.testing.assert_array_equal(together[0], alone)
    batch = pack(BUCKET, [row(3, seed=1), row(8, seed=2)])
    noise = np.random.default_rng(9).integers(0, 64, batch.input_ids.shape, np.int32)
    behind = np.arange(BUCKET.seq_len)[None, :] >= batch.column(Column.LENGTH)[:, None]
    expected = engine.run(batch)
    batch.input_ids[behind] = noise[behind]
    np.testing.assert_array_equal(engine.run(batch), expected)


def test_where_a_row_stands_does_not_matter(engine: Engine) -> None:
    """Rows in another order give the same vectors in that order."""
    rows = [row(3, seed=1), row(8, seed=2), row(1, seed=3), row(5, seed=4)]
    order = [2, 0, 3, 1]
    got = engine.run(pack(BUCKET, rows))
    np.testing.assert_allclose(engine.run(pack(BUCKET, [rows[i] for i in order])), got[order], atol=1e-6)
    assert len({vector.tobytes() for vector in got}) == 4


def test_any_bucket_gives_the_same(engine: Engine) -> None:
    """More room is more padding and nothing else."""
    rows = [row(3, seed=1), row(8, seed=2)]
    long = engine.run(pack(Bucket(4, 32), rows))
    np.testing.assert_allclose(engine.run(pack(BUCKET, rows)), long, atol=1e-6)


def test_a_flat_bucket_gives_the_same(model: Model) -> None:
    """Rows one behind another, whatever their order, with or without room left; what stands there does not matter."""
    rows = [row(3, seed=1), row(8, seed=2, dimensions=5, normalize=True), row(1, seed=3), row(5, seed=4)]
    shapes = [Bucket(4, 8), Bucket(4, 8, 17), Bucket(6, 12, 40)]
    engine = Engine(model, Ladder(shapes))
    for shape in shapes:
        engine.compile(shape)
    want = engine.run(pack(shapes[0], rows))
    for shape in shapes[1:]:
        np.testing.assert_allclose(engine.run(pack(shape, rows)), want, atol=1e-6)
        np.testing.assert_allclose(engine.run(pack(shape, rows[::-1])), want[::-1], atol=1e-6)
    batch = pack(shapes[2], rows)
    batch.input_ids[0, 17:] = 63
    np.testing.assert_array_equal(engine.run(batch), engine.run(pack(shapes[2], rows)))
    assert engine.run(pack(shapes[2], [])).shape == (0, 16)


@pytest.mark.parametrize("shape", [Bucket(4, 8), Bucket(5, 8, 24)])
def test_a_full_batch_fills_its_shape(shape: Bucket) -> None:
    """As one is timed."""
    batch = full(shape)
    assert batch.rows == shape.batch_size
    assert batch.column(Column.LENGTH).sum() == shape.tokens
    assert (batch.column(Column.TOKENS) == batch.column(Column.LENGTH)).all()
    assert 0 < batch.column(Column.LENGTH).max() <= shape.seq_len


def test_only_real_rows_come_back(engine: Engine) -> None:
    """In the batch's order, as float32 on the host; a batch of padding gives none."""
    got = engine.run(pack(BUCKET, [row(3), row(4)]))
    assert isinstance(got, np.ndarray)
    assert (got.shape, got.dtype) == ((2, engine.dimension), np.float32)
    assert engine.run(pack(BUCKET, [])).shape == (0, 16)


@pytest.mark.parametrize("devices", [1, 8])
def test_batches_of_several_threads_do_not_mix(tiny_folder: Path, devices: int) -> None:
    """Each gets what it gets alone; nor do devices hang that wait for one another, with the weights split."""
    mesh = make_mesh(jax.devices()[:devices], model_parallel=min(2, devices))
    bucket = Bucket(8, 8)
    engine = Engine(load(tiny_folder, mesh=mesh), Ladder([bucket]))
    engine.compile(bucket)
    batches = [pack(bucket, [row(3, seed=seed), row(5, seed=seed)]) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(engine.run, batches))
    np.testing.assert_array_equal(together, [engine.run(batch) for batch in batches])


@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_are_left_out_per_row(tmp_path: Path, rows: int) -> None:
    """With a model that leaves prompts out, two rows that differ in their prompt length only differ."""
    folder = save_checkpoint(tiny_bert(num_hidden_layers=1), tmp_path)
    (folder / "modules.json").write_text(
        '[{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},'
        ' {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode": "mean", "include_prompt": false}')
    engine = Engine(load(folder, mesh=make_mesh(jax.devices()[:1])), Ladder([BUCKET]))
    engine.compile(BUCKET)
    ids = row(8, seed=1).encoding.ids
    batch = pack(BUCKET, [Row(Encoding(ids, prompt), 16, False, 0) for prompt in range(rows)])
    got = engine.run(batch)
    hidden = np.asarray(
        jax.jit(lambda leaves, ids, mask: engine.model.encoder(leaves).hidden_states(Tokens.plain(ids, mask))[-1])(
            engine.model.leaves, ids[None], np.ones((1, 8), bool)
        )
    )
    np.testing.assert_allclose(got, [hidden[0, prompt:].mean(axis=0) for prompt in range(rows)], atol=1e-6)


def test_the_default_ladder_is_the_model_s_and_the_platform_s(model: Model) -> None:
    """Up to the model's length, with the platform's tokens a dispatch."""
    ladder = Engine(model).ladder
    default = Ladder.default(max_length=32, max_batch_tokens=MAX_BATCH_TOKENS["cpu"], flat=True)
    assert ladder.buckets == default.buckets
    assert Engine(model, max_batch_tokens=64).ladder.batch_tokens == 64


@pytest.mark.parametrize("tokens", [0, -1])
def test_an_impossible_number_of_tokens(model: Model, tokens: int) -> None:
    """Nought is not "the default"."""
    with pytest.raises(BucketError, match="at least 1"):
        Engine(model, max_batch_tokens=tokens)


def test_several_devices_get_as_much_each(tiny_folder: Path) -> None:
    """The default ladder grows with the data axis, and every batch divides over it."""
    model = load(tiny_folder, mesh=make_mesh(model_parallel=2))
    ladder = Engine(model, max_batch_tokens=64).ladder
    assert ladder.batch_tokens == 4 * 64
    assert all(bucket.batch_size % 4 == 0 for bucket in ladder.buckets)
    with pytest.raises(BucketError, match="the bucket 6x8 does not divide over 4 devices"):
        Engine(model, Ladder([Bucket(4, 8), Bucket(6, 8)]))
    with pytest.raises(BucketError, match="the bucket 8x8/32 does not divide over 4 devices"):
        Engine(model, Ladder([Bucket(4, 8), Bucket(8, 8, 32)]))


def test_how_many_at_a_time_on_cpu(tiny_folder: Path, engine: Engine) -> None:
    """Two, which take the cores from each other; but one where devices wait for one another."""
    assert engine.platform == "cpu"
    assert engine.shares_cores
    assert engine.side_by_side == 2
    assert Engine(load(tiny_folder, mesh=make_mesh())).side_by_side == 1


@pytest.mark.parametrize("model_parallel", [1, 2])
def test_eight_devices_give_what_one_gives(tiny_folder: Path, engine: Engine, model_parallel: int) -> None:
    """Data parallel, and with the weights split; also for a batch that does not fill every device. Unit vectors: split
    weights are summed in another order, and a difference means something only beside a known length."""
    model = load(tiny_folder, mesh=make_mesh(model_parallel=model_parallel))
    bucket = Bucket(8, 8)
    spread = Engine(model, Ladder([bucket]))
    spread.compile(bucket)
    rows = [row(length, seed=7, owner=length, normalize=True) for length in (8, 1, 3, 5, 2)]
    got = spread.run(pack(bucket, rows))
    expected = np.concatenate([engine.run(pack(BUCKET, rows[:4])), engine.run(pack(BUCKET, rows[4:]))])
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_rows_of_padding_are_finite(engine: Engine) -> None:
    """They are thrown away, but a debugger that looks for NaN must not stop at them."""
    all_rows = dataclasses.replace(pack(BUCKET, [row(3)]), owners=np.arange(BUCKET.batch_size))
    assert np.isfinite(engine.run(all_rows)).all()


def test_a_dispatch_costs_more_elsewhere(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine puts its prices into each ladder that it plans by."""
    engine = Engine(load(tiny_folder, mesh=make_mesh(jax.devices()[:2])))
    other = Ladder([Bucket(2, 8)])
    engine.allow(other)
    assert engine.ladder.prices == other.prices == PRICES
    monkeypatch.setattr(engine, "platform", "gpu")
    engine.allow(other)
    assert other.prices == ACCELERATOR_PRICES._replace(call=2 * ACCELERATOR_PRICES.call)


def test_on_a_gpu_the_first_run_of_an_executable_is_alone(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for runs under way, and others wait for it; what is compiled before it waits for nobody."""
    lock = SharedLock()
    engine = Engine(model, Ladder([BUCKET, Bucket(1, 8)]))
    engine.compile(BUCKET)
    batch = pack(BUCKET, [row(3)])
    expected = engine.run(batch)
    monkeypatch.setattr(engine, "_shared", lock.shared)
    monkeypatch.setattr(engine, "_alone", lock.alone)
    with ThreadPoolExecutor(2) as pool:
        with lock.shared():
            first = pool.submit(engine.compile, Bucket(1, 8))
            while not lock._waiting:
                time.sleep(0.01)
            with pytest.raises(FutureTimeoutError):
                first.result(0.2)
        assert first.result(60).bucket == Bucket(1, 8)
        with lock.alone():
            run = pool.submit(engine.run, batch)
            with pytest.raises(FutureTimeoutError):
                run.result(0.2)
        np.testing.assert_array_equal(run.result(60), expected)
