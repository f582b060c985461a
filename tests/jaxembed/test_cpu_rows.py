"""The kernels in C++ that sum up rows: of tables, normalised, and of tokens."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from jaxembed import cpu_kernels, cpu_library, make_mesh
from jaxembed.kernels import Kernels, Line, right_padded
from jaxembed.layers import Embedding, LayerNorm
from jaxembed.lookups import embedded
from jaxembed.tokens import Rows

Floats = npt.NDArray[np.float32]

pytestmark = pytest.mark.usefixtures("library")

EPS = 1e-3


def normalised(x: npt.NDArray[np.float64], scale: Floats, shift: Floats | float) -> npt.NDArray[np.float64]:
    """The formula of LayerNorm."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPS) * scale + shift


@pytest.mark.parametrize("width", [1, 5, 31, 96, 384])
@pytest.mark.parametrize("tables", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embed(width: int, tables: int, dtype: str) -> None:
    """Of any number of tables, with a bias of the norm and without; many tokens are shared out among threads."""
    random = np.random.default_rng(width)
    rows = [random.normal(size=(7 + n, width)).astype(dtype) for n in range(tables)]
    scale, shift = random.normal(size=(2, width)).astype(np.float32)
    for lines, places in ((1, 1), (1, 40), (3, 9), (1, 1000)):
        ids = [random.integers(0, len(one), (lines, places), np.int32) for one in rows]
        if tables > 1:
            # One line for all, as places are in padded batches; or one id.
            ids[1] = ids[1][:1]
            ids[-1] = ids[-1][:1, :1] if tables > 2 else ids[-1]

        def call(rows: Sequence[jax.Array], ids: Sequence[jax.Array], scale: Any, shift: Any) -> list[jax.Array]:
            found = list(zip(rows, ids, strict=True))
            return [cpu_kernels.embed(found, (scale, bias, EPS)) for bias in (shift, None)]

        total = sum(
            np.broadcast_to(one.astype(np.float64)[which], (lines, places, width))
            for one, which in zip(rows, ids, strict=True)
        )
        for got, added in zip(jax.jit(call)(rows, ids, scale, shift), (shift, 0.0), strict=True):
            # Some roundings of float32. Of few features the variance may be near 0, and a sum's is divided by that.
            wanted = normalised(total, scale, added)
            np.testing.assert_allclose(got, wanted, rtol=5e-7, atol=3e-5 if width < 8 else 1e-6)


def test_ids_beyond_a_table() -> None:
    """The first row or the last, as XLA's reads them: ids are checked before."""
    embedding, norm = Embedding((3, 8), ("vocab", "embed"), "float32"), LayerNorm(8, EPS)
    embedding.table[...] = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8)), jnp.float32)
    norm.scale[...] = jnp.ones(8)
    ids = jnp.asarray([[-(2**31), -1, 0, 2, 3, 2**31 - 1]], jnp.int32)
    with right_padded(Kernels(make_mesh(jax.devices()[:1]), cpu_tokens=6)):
        got = jax.jit(lambda ids: embedded([(embedding, ids)], norm))(ids)[0]
    np.testing.assert_array_equal(got[:2], got[jnp.array([2, 2])])
    np.testing.assert_array_equal(got[4:], got[jnp.array([3, 3])])
    np.testing.assert_allclose(got, embedded([(embedding, ids.clip(0, 2))], norm)[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("tokens", [-1, 0, 1, 7, 39, 40, 41])
def test_embed_only_the_tokens_that_there_are(tokens: int) -> None:
    """As many as are told, and no more than there is room for: ids behind them may be any."""
    random = np.random.default_rng(0)
    table, ids = random.normal(size=(9, 16)).astype(np.float32), random.integers(0, 9, (1, 40), np.int32)
    there = min(max(tokens, 0), 40)
    spoilt = ids.copy()
    spoilt[0, there:] = 2**31 - 1

    def call(ids: jax.Array, tokens: Any) -> jax.Array:
        norm = (jnp.ones(16), None, EPS)
        return cpu_kernels.embed([(jnp.asarray(table), ids)], norm, tokens=tokens)

    some = jax.jit(call)(spoilt, jnp.asarray(tokens, jnp.int32))
    np.testing.assert_array_equal(some[0, :there], jax.jit(lambda ids: call(ids, None))(ids)[0, :there])


@pytest.mark.parametrize("width", [1, 5, 24, 384])
@pytest.mark.parametrize("lengths", [[1], [5, 0, 1, 12, 3], [0, 0], [200, 300, 7]])
def test_totals(width: int, lengths: list[int]) -> None:
    """Of rows one behind another: what stands behind the last token, and weights behind a row's, are not looked at."""
    random = np.random.default_rng(width)
    longest, there, room = max(1, *lengths), sum(lengths), sum(lengths) + 9
    x = random.normal(size=(1, room, width)).astype(np.float32)
    weights = random.normal(size=(len(lengths), longest)).astype(np.float32)
    wanted = np.zeros((len(lengths), width))
    end = 0
    for row, length in enumerate(lengths):
        wanted[row] = weights[row, :length].astype(np.float64) @ x[0, end : end + length]
        weights[row, length:] = np.nan
        end += length
    x[0, there:] = np.nan
    starts = (np.cumsum(lengths) - lengths).astype(np.int32)
    counts = np.array(lengths, np.int32)
    got = jax.jit(lambda *y: cpu_kernels.totals(*y[:-1], tokens=y[-1]))(x, weights, starts, counts, np.int32(there))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * longest**0.5)


def test_totals_of_padded_rows() -> None:
    """Each in a line of its own: as XLA's, of what `Rows` says."""
    x = np.random.default_rng(0).normal(size=(3, 6, 16)).astype(np.float32)
    rows = Rows(jnp.arange(6)[None] < jnp.asarray([6, 1, 0])[:, None])
    weights = rows.mask.astype(jnp.float32)
    with right_padded(Kernels(make_mesh(jax.devices()[:1]), cpu_tokens=18)):
        got = jax.jit(rows.total)(x, weights)
    np.testing.assert_allclose(got, rows.total(jnp.asarray(x), weights), rtol=0, atol=1e-6)


def test_a_row_that_says_more_than_there_is() -> None:
    """Is cut at the end of the tokens that there are; memory behind them is not read."""
    x, weights = np.ones((1, 4, 8), np.float32), np.ones((3, 100), np.float32)
    x[0, 3:] = np.nan
    starts, counts = np.array([-3, 2, 2**30], np.int32), np.array([2, 90, 90], np.int32)
    got = jax.jit(lambda *y: cpu_kernels.totals(*y, tokens=jnp.asarray(3)))(x, weights, starts, counts)
    np.testing.assert_array_equal(got[:, 0], [2, 1, 0])


def test_used_up_to_a_number_of_tokens() -> None:
    """And never outside of what is compiled for a batch, where there may be gradients; nor for tables of two dtypes."""
    float_table, half_table = (Embedding((5, 8), ("vocab", "embed"), dtype) for dtype in ("float32", "bfloat16"))
    norm, mesh = LayerNorm(8, EPS), make_mesh(jax.devices()[:1])
    ids, rows = jnp.zeros((1, 20), jnp.int32), Rows.in_line(jnp.asarray([3]), jnp.asarray([3]), tokens=20, length=4)

    def embed_one(ids: jax.Array) -> jax.Array:
        return embedded([(float_table, ids)], norm)

    def embed_two(ids: jax.Array) -> jax.Array:
        return embedded([(float_table, ids), (half_table, ids)], norm)

    def total(ids: jax.Array) -> jax.Array:
        return rows.total(ids[:, :, None].astype(jnp.float32), rows.mask.astype(jnp.float32))

    def used(call: Callable[[jax.Array], jax.Array], room: int | None) -> list[str]:
        there = (
            nullcontext() if room is None else right_padded(Kernels(mesh, cpu_tokens=room), Line(20, jnp.asarray(3)))
        )
        with there:
            # A function of its own each time: JAX does not trace one twice.
            program = jax.jit(lambda ids: call(ids)).lower(ids).as_text()
        return [name for name in cpu_library.Target if f"@{name}(" in program]

    assert used(embed_one, 20) == ["jaxembed_embed"]
    assert used(total, 20) == ["jaxembed_totals"]
    assert not any(used(call, room) for call in (embed_one, total) for room in (19, 0, None))
    assert not used(embed_two, 20)
