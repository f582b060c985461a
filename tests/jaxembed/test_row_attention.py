"""The kernel for TPU, interpreted on CPU; what it takes; and that it is used only where it gives what it should."""

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu
from jax.sharding import Mesh

from jaxembed import make_mesh
from jaxembed import row_attention as kernel
from jaxembed.attention import attention
from jaxembed.kernel_choice import kernels_on
from jaxembed.kernels import Kernels, right_padded
from jaxembed.row_attention import ALLOWED, KINDS, error, row_attention, row_attention_takes
from jaxembed.tokens import Rows

FLOAT32, BFLOAT16 = jnp.dtype("float32"), jnp.dtype("bfloat16")

OTHERS = (
    (16, 12, 12, 32, False, None),
    (48, 4, 4, 32, True, 3),
    (128, 2, 2, 64, False, 16),
    (144, 1, 1, 128, False, None),
    (256, 3, 1, 256, False, 100),
    (1040, 4, 1, 128, True, None),
)
"""As KINDS: several groups of heads, products that are not filled, rows longer than a step, all queries of one key."""


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels for TPU run on CPU in here."""
    with tpu.force_tpu_interpret_mode(), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize(
    ("kind", "dtype"), [*itertools.product(KINDS, ALLOWED), *itertools.product(OTHERS, ["float32"])]
)
def test_it_gives_what_the_formula_says(kind: tuple[Any, ...], dtype: str) -> None:
    """Rows of all lengths, of one token too, in every kind of step."""
    with interpreted():
        assert error(jax.devices()[0], dtype, *kind) <= {"float32": 2e-6, "bfloat16": 0.02}[dtype]


@pytest.mark.parametrize("devices", [1, 2])
def test_rows_on_several_devices(devices: int) -> None:
    """Each computes its own; a row of padding is finite."""
    mesh = make_mesh(jax.devices()[:devices])
    random = np.random.default_rng(0)
    q, k, v = random.normal(size=(3, 4, 32, 128)).astype(np.float32)
    mask = np.arange(32) < np.array([[32], [5], [0], [17]])
    options: dict[str, Any] = {"heads": (2, 2), "scale": 0.125, "causal": False, "window": None, "dtype": FLOAT32}
    with interpreted():
        got = np.asarray(jax.jit(partial(row_attention, mesh=mesh, **options))(q, k, v, mask))
    wanted = np.asarray(attention(*map(jnp.asarray, (q, k, v)), Rows(jnp.asarray(mask)), num_heads=2, dtype=FLOAT32))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[mask], wanted[mask], atol=2e-6)


@pytest.mark.parametrize(
    ("taken", "length", "heads", "width", "dtype"),
    [
        (True, 16, (12, 12), 32, BFLOAT16),
        (True, 512, (12, 12), 64, FLOAT32),
        (True, 1024, (16, 8), 128, FLOAT32),
        (True, 2048, (3, 1), 256, BFLOAT16),
        (False, 24, (12, 12), 32, BFLOAT16),
        (False, 2048, (12, 12), 64, FLOAT32),
        (False, 2064, (12, 12), 64, BFLOAT16),
        (False, 128, (14, 2), 64, BFLOAT16),
        (False, 128, (3, 3), 64, BFLOAT16),
        (False, 128, (8, 8), 96, BFLOAT16),
        (False, 128, (8, 8), 384, BFLOAT16),
    ],
)
def test_what_it_takes(taken: bool, length: int, heads: tuple[int, int], width: int, dtype: jnp.dtype) -> None:
    """Whole tiles, rows that fit on the chip, and steps of whole heads."""
    assert row_attention_takes(length, heads, width, dtype, make_mesh(jax.devices()[:1])) == taken


def test_heads_on_several_devices_are_not_taken() -> None:
    """A device that has a part of the heads would need a part of each step."""
    mesh = make_mesh(jax.devices()[:2], model_parallel=2)
    assert not row_attention_takes(16, (12, 12), 32, BFLOAT16, mesh)


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On TPU, if it works there; not on other platforms, and not with a bias or a mask that may have holes."""

    def marked(query: jax.Array, *_: Any, **__: Any) -> jax.Array:
        return jnp.full_like(query, 12345.0)

    mesh = make_mesh(jax.devices()[:1])

    def used(platform: str, *, works: bool = True, right: bool = True, **options: Any) -> bool:
        q = np.zeros((2, 16, 128), np.float32)
        rows = Rows(np.ones((2, 16), bool))
        call = jax.jit(partial(attention, num_heads=2, dtype=BFLOAT16, **options))
        with right_padded(Kernels(mesh, rows=works)) if right else nullcontext():
            traced = call.trace(q, q, q, rows)
        return "1.234500e+04" in traced.lower(lowering_platforms=(platform,)).as_text()

    monkeypatch.setattr(kernel, "row_attention", marked)
    assert used("tpu")
    assert not used("tpu", works=False)
    assert used("tpu", causal=True, window=3)
    assert not used("cpu")
    assert not used("cuda")
    assert not used("tpu", right=False)
    assert not used("tpu", bias=jnp.zeros((1, 2, 16, 16)))


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bool]:
    """Try anew what is tried on a TPU, here only the first of it."""
    monkeypatch.setattr(kernel, "KINDS", KINDS[:1])
    return partial(kernel.tried.__wrapped__, jax.devices()[0])


@pytest.mark.parametrize("dtype", ALLOWED)
def test_it_works(works: Callable[[str], bool], dtype: str) -> None:
    """What is tried on a TPU before it is used."""
    with interpreted():
        assert works(dtype)


@pytest.mark.parametrize("wrong", ["values", "nan", "error"])
def test_where_it_does_not_work(
    works: Callable[[str], bool], wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not used, and the log says why; nothing fails."""
    true = kernel.mixed

    def broken(*arguments: Any) -> jax.Array:
        if wrong == "error":
            raise NotImplementedError("the compiler does not take this")
        return true(*arguments) * (1.01 if wrong == "values" else jnp.nan)

    monkeypatch.setattr(kernel, "mixed", broken)
    with interpreted(), caplog.at_level(logging.WARNING):
        assert not works("float32")
    said = caplog.messages[-1]
    assert "is not used" in said
    assert ("does not take this" if wrong == "error" else "in float32") in said


def test_kernels_of_a_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    """None on CPU, where nothing is tried; on TPU what works there, on a GPU what its generation takes."""

    def found(device: Any) -> tuple[int, bool]:
        return kernels_on(Mock(Mesh, devices=np.array([[device]], object)), "float32")[1:3]

    tried = []
    monkeypatch.setattr(kernel, "row_attention_works", lambda *asked: bool(tried.append(asked)) or True)
    assert kernels_on(make_mesh(jax.devices()[:1]), "bfloat16")[1:] == (0, False, 0)
    assert found(SimpleNamespace(platform="gpu", compute_capability="9.0")) == (256, False)
    assert not tried
    device = SimpleNamespace(platform="tpu")
    assert found(device) == (0, True)
    assert tried == [(device, "float32")]
