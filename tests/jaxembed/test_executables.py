"""Executables out of the cache: the same numbers, and never another model's, shape's, output's or machine's."""

import pickle
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from parity import save_checkpoint, tiny_bert

from jaxembed import Bucket, Ladder, executables, make_mesh
from jaxembed.cache import Cache
from jaxembed.engine import Engine
from jaxembed.executables import facts
from jaxembed.loading import load
from jaxembed.model import Model
from jaxembed.packing import Row, pack
from jaxembed.types import Encoding, Output

BUCKET = Bucket(2, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_bert(num_hidden_layers=1), tmp_path_factory.mktemp("one-layer"))


def vectors(model: Model, output: Output = Output.DENSE) -> tuple[np.ndarray, bool]:
    """What a new engine gives for two rows, and whether its executable came from the cache."""
    engine = Engine(model, Ladder([BUCKET]), output=output)
    cached = engine.compile(BUCKET).cached
    rows = [Row(Encoding(np.array(ids, np.int32)), model.dimension, True, i) for i, ids in enumerate(([1, 5, 2], [1]))]
    return engine.run(pack(BUCKET, rows)), cached


@pytest.mark.parametrize(("devices", "model_parallel"), [(1, 1), (2, 1), (2, 2)])
def test_it_gives_what_was_compiled(folder: Path, cache: Path, devices: int, model_parallel: int) -> None:
    """Bit by bit, also over a mesh, which must not be that of all devices."""
    mesh = make_mesh(jax.devices()[2 : 2 + devices], model_parallel=model_parallel)
    model = load(folder, mesh=mesh)
    compiled, first = vectors(model)
    loaded, second = vectors(load(folder, mesh=mesh))
    assert (first, second) == (False, True)
    np.testing.assert_array_equal(loaded, compiled)


def test_other_weights_of_the_same_kind_share_it(folder: Path, tmp_path: Path, cache: Path) -> None:
    """Weights are arguments: what is kept is the program alone."""
    model = load(folder, mesh=make_mesh(jax.devices()[:1]))
    first, _ = vectors(model)
    other = replace(model, leaves=tuple(jax.device_put(np.asarray(leaf) * 2, leaf.sharding) for leaf in model.leaves))
    second, cached = vectors(other)
    assert cached
    assert not np.allclose(first, second)


def test_whatever_else_differs_makes_another(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_mesh(jax.devices()[:1])
    model = load(folder, mesh=one)
    _, cached = vectors(model)
    assert not cached
    assert not vectors(model, Output.TOKENS)[1]
    assert not vectors(load(folder, mesh=one, dtype="bfloat16"))[1]
    assert not vectors(load(folder, mesh=make_mesh(jax.devices()[1:2])))[1]
    config = {**model.checkpoint.config, "layer_norm_eps": 0.5}
    assert facts(replace(model, checkpoint=replace(model.checkpoint, config=config)), Output.DENSE) != facts(
        model, Output.DENSE
    )
    monkeypatch.setattr(executables, "host_cpu", lambda: "a CPU without AVX")
    assert not vectors(model)[1]


def test_bytes_that_are_no_executable_are_compiled_again(
    folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And replaced, so that the next start finds what it needs."""
    model = load(folder, mesh=make_mesh(jax.devices()[:1]))
    expected, _ = vectors(model)
    (file,) = (cache / executables.KIND).iterdir()
    for content in (b"garbage", pickle.dumps((b"garbage", None, None))):
        Cache(cache).write(executables.KIND, file.name, content)
        got, cached = vectors(model)
        assert not cached
        np.testing.assert_array_equal(got, expected)
        assert "cannot be loaded; it is compiled again" in caplog.text
        assert vectors(model)[1]
