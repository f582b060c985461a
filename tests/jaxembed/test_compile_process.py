"""Shapes compiled into the cache by a process beside this one: what it makes, and whatever keeps it from that."""

import logging
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxembed import Bucket, Embedder, Ladder, compile_process, make_mesh
from jaxembed.cache import Cache
from jaxembed.compile_process import Task, compile_beside
from jaxembed.engine import Engine
from jaxembed.executables import facts, has
from jaxembed.loading import load
from jaxembed.packing import full
from jaxembed.processes import python_command
from jaxembed.types import Output
from jaxembed.warmup import use_cache

LADDER = Ladder([Bucket(1, 8), Bucket(4, 8, 16)])


def engine_of(folder: Path, *, devices: int = 1) -> Engine:
    return Engine(load(folder, mesh=make_mesh(jax.devices()[:devices])), Ladder([Bucket(devices, 32)]))


def not_started(*_: object, **__: object) -> None:
    raise AssertionError("a process was started")


def test_an_abstract_model_is_the_same_for_the_cache(tiny_folder: Path) -> None:
    """Its leaves hold no numbers, but are told from one another as the weights are."""
    mesh = make_mesh(jax.devices()[:1])
    whole, abstract = load(tiny_folder, mesh=mesh), load(tiny_folder, mesh=mesh, abstract=True)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in abstract.leaves)
    assert facts(abstract, Output.DENSE) == facts(whole, Output.DENSE)


def test_the_shapes_are_in_the_cache_afterwards(
    tiny_folder: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine loads them, and they give what it would have compiled itself, bit by bit."""
    engine = engine_of(tiny_folder)
    compile_beside(engine, LADDER)
    assert not caplog.records
    engine.allow(LADDER)
    assert [engine.compile(bucket).cached for bucket in LADDER.buckets] == [True, True]
    own = Embedder.from_pretrained(tiny_folder, mesh=make_mesh(jax.devices()[:1]), ladder=LADDER).engine
    use_cache(None)
    for bucket in LADDER.buckets:
        assert not own.compile(bucket).cached
        np.testing.assert_array_equal(engine.run(full(bucket)), own.run(full(bucket)))


@pytest.mark.parametrize("devices", [1, 2])
def test_where_there_is_nothing_to_do(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    """No process for shapes that the cache has, for several devices, or without a cache."""
    monkeypatch.setattr(subprocess, "Popen", not_started)
    engine = engine_of(tiny_folder, devices=devices)
    if devices == 1:
        engine.compile(Bucket(1, 32))
    compile_beside(engine, engine.ladder)
    use_cache(None)
    compile_beside(engine, Ladder([Bucket(devices, 16)]))


@pytest.mark.parametrize(
    "line", [["-c", "import sys; sys.exit(3)"], ["-c", "import sys; sys.stdin.read(1); sys.exit(3)"]]
)
def test_a_process_that_fails_is_a_warning(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, line: list[str]
) -> None:
    """Whether it ends before or after it is told: the engine compiles then."""
    monkeypatch.setattr(compile_process, "python_command", lambda module: [sys.executable, *line])
    engine = engine_of(tiny_folder)
    with caplog.at_level(logging.WARNING):
        compile_beside(engine, LADDER)
    assert "ended with 3" in caplog.text
    engine.allow(LADDER)
    assert not engine.compile(LADDER.buckets[0]).cached


def test_no_process_at_all_is_a_warning(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system may refuse one."""
    monkeypatch.setattr(compile_process, "python_command", lambda module: ["/nowhere/python"])
    with caplog.at_level(logging.WARNING):
        compile_beside(engine_of(tiny_folder), LADDER)
    assert "cannot be started" in caplog.text


def test_it_ends_with_the_process_that_started_it(tiny_folder: Path, tmp_path: Path) -> None:
    """Not when it has done what it was told, for nobody wants it any more."""
    model = load(tiny_folder, mesh=make_mesh(jax.devices()[:1]), abstract=True)
    buckets = [Bucket(rows, 32) for rows in range(1, 200)]
    task = Task(model.checkpoint, model.dtype, model.max_length, Output.DENSE, buckets, tmp_path)
    process = subprocess.Popen(python_command(compile_process.__name__), stdin=subprocess.PIPE)
    process.communicate(pickle.dumps(task), timeout=60)
    assert process.returncode == 1
    done = Cache(tmp_path)
    assert not all(has(done, model, Output.DENSE, bucket) for bucket in buckets)
