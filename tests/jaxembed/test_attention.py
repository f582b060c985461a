"""Attention against its formula in float64, and which kernel computes it."""

import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed import attention as attention_module
from jaxembed.attention import FUSED_LENGTH, attention, fused_attention, right_padded
from jaxembed.tokens import Rows

FLOAT32 = jnp.dtype("float32")
BFLOAT16 = jnp.dtype("bfloat16")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal, float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reference_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, heads: int) -> np.ndarray:
    """softmax(Q K^T / sqrt(H)) V head by head and row by row, in float64, over the keys that may be seen only."""
    out = np.zeros(q.shape)
    size = q.shape[-1] // heads
    for row in range(q.shape[0]):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            keys, values = (x[row, mask[row], part].astype(np.float64) for x in (k, v))
            scores = q[row, :, part].astype(np.float64) @ keys.T / np.sqrt(size)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[row, :, part] = weights / weights.sum(axis=1, keepdims=True) @ values
    return out


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_attention(heads: int) -> None:
    """Several head counts; masks with holes."""
    q, k, v = normal(3, 7, 12), normal(3, 7, 12, seed=1), normal(3, 7, 12, seed=2)
    mask = np.random.default_rng(3).random((3, 7)) < 0.6
    mask[:, 2] = True
    got = jax.jit(lambda *a: attention(*a, num_heads=heads, dtype=FLOAT32))(q, k, v, Rows(mask))
    np.testing.assert_allclose(got, reference_attention(q, k, v, mask, heads), atol=1e-6)


def test_attention_of_rows_in_line() -> None:
    """Each row sees itself alone, and of itself what it may see."""
    lengths, seen = [3, 5, 1, 0], [3, 4, 1, 0]
    q, k, v = normal(1, 11, 8), normal(1, 11, 8, seed=1), normal(1, 11, 8, seed=2)
    rows = Rows.in_line(jnp.asarray(lengths), jnp.asarray(seen), tokens=11, length=6)
    got = np.asarray(jax.jit(lambda *a: attention(*a, num_heads=2, dtype=FLOAT32))(q, k, v, rows))
    assert got.shape == q.shape and np.isfinite(got).all()
    for start, length, keys in zip(np.cumsum([0, *lengths]), lengths, seen, strict=False):
        own = slice(start, start + length)
        mask = np.arange(length)[None] < keys
        wanted = reference_attention(*(x[:, own] for x in (q, k, v)), mask, 2) if length else q[:, own]
        np.testing.assert_allclose(got[:, own], wanted, atol=1e-6)


def test_attention_does_not_overflow() -> None:
    """Scores of thousands: the greatest is taken off before the exponential."""
    q, k, v = 100 * normal(1, 4, 8), 100 * normal(1, 4, 8, seed=1), normal(1, 4, 8, seed=2)
    mask = np.ones((1, 4), bool)
    got = attention(*map(jnp.asarray, (q, k, v)), Rows(jnp.asarray(mask)), num_heads=2, dtype=FLOAT32)
    np.testing.assert_allclose(got, reference_attention(q, k, v, mask, 2), atol=1e-4)


def test_masked_keys_have_no_weight_at_all() -> None:
    """Whatever stands in them, the result is the same to the last bit."""
    q, k, v = normal(2, 5, 8), normal(2, 5, 8, seed=1), normal(2, 5, 8, seed=2)
    mask = np.array([[True, True, False, True, False], [True, False, False, False, False]])
    hidden = ~mask[:, :, None]
    compute = jax.jit(lambda k, v: attention(jnp.asarray(q), k, v, Rows(jnp.asarray(mask)), num_heads=2, dtype=FLOAT32))
    plain = compute(k, v)
    np.testing.assert_array_equal(plain, compute(np.where(hidden, 1e3, k), np.where(hidden, -1e3, v)))
    # A single visible key is copied.
    np.testing.assert_allclose(plain[1], np.broadcast_to(v[1, 0], (5, 8)), atol=1e-7)


def test_a_row_without_any_key_is_finite() -> None:
    """Rows of padding are thrown away; they must not poison a gradient or a debugger with NaN."""
    q, k, v = (jnp.asarray(normal(2, 4, 8, seed=seed)) for seed in range(3))
    mask = jnp.asarray([[True] * 4, [False] * 4])

    def total(q: jax.Array) -> jax.Array:
        return attention(q, k, v, Rows(mask), num_heads=2, dtype=FLOAT32).sum()

    assert np.isfinite(attention(q, k, v, Rows(mask), num_heads=2, dtype=FLOAT32)).all()
    assert np.isfinite(jax.grad(total)(q)).all()


def test_attention_in_bfloat16_returns_float32() -> None:
    """On CPU it computes in float32; elsewhere both products round to bfloat16, sums do not."""
    q, k, v = normal(1, 6, 8), normal(1, 6, 8, seed=1), normal(1, 6, 8, seed=2)
    mask = np.array([[True, True, False, True, True, False]])
    call = jax.jit(partial(attention, num_heads=2, dtype=BFLOAT16))
    got = call(q, k, v, Rows(mask))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference_attention(q, k, v, mask, 2), atol=1e-6)
    for platform, products in (("cpu", 0), ("cuda", 2), ("tpu", 2)):
        text = call.trace(q, k, v, Rows(mask)).lower(lowering_platforms=(platform,)).as_text()
        assert len(re.findall(r"dot_general.*xbf16>, tensor<[0-9x]*xbf16>\) -> tensor<[0-9x]*xf32>", text)) == products


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As if there were a GPU: calls for cuDNN's attention are listed, and answered by XLA's."""
    asked: list[Any] = []
    true = jax.nn.dot_product_attention

    def stand_in(*arrays: Any, implementation: str, **options: Any) -> Any:
        asked.append((implementation, arrays[0].dtype))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return true(*arrays, implementation="xla", **options)

    monkeypatch.setattr(attention_module, "has_fused_attention", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return asked


def test_fused_attention(asked: list[Any]) -> None:
    """What cuDNN is given means the same: scale, heads, and lengths in place of the mask; no NaN for a row of none."""
    q, k, v = normal(4, 64, 16), normal(4, 64, 16, seed=1), normal(4, 64, 16, seed=2)
    mask = np.arange(64) < np.array([[64], [1], [40], [0]])
    got = fused_attention(*map(jnp.asarray, (q, k, v, mask)), num_heads=2, scale=8**-0.5)
    assert asked == [("cudnn", BFLOAT16)]
    assert got.dtype == jnp.float32
    assert np.isfinite(got).all()
    expected = reference_attention(q[:3], k[:3], v[:3], mask[:3], 2)
    np.testing.assert_allclose(got[:3], expected, atol=0.03)


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        (True, {}),
        (False, {"dtype": FLOAT32}),
        (False, {"causal": True}),
        (False, {"window": 8}),
        (False, {"bias": jnp.zeros((1, 2, FUSED_LENGTH, FUSED_LENGTH))}),
        (False, {"num_heads": 4, "num_key_value_heads": 2}),
        (False, {"num_heads": 4}),
        (False, {"length": FUSED_LENGTH - 1}),
        (False, {"right": False}),
    ],
)
def test_when_attention_is_fused(asked: list[Any], wanted: bool, options: dict[str, Any]) -> None:
    """Where the kernel takes it and it pays; not with a mask that may have holes. And only on a GPU: here it is not."""
    length, right = options.pop("length", FUSED_LENGTH), options.pop("right", True)
    options = {"num_heads": 2, "dtype": BFLOAT16} | options
    heads, kv_heads = options["num_heads"], options.get("num_key_value_heads", options["num_heads"])
    q = normal(2, length, 16)
    k, v = (normal(2, length, 16 * kv_heads // heads, seed=seed) for seed in (1, 2))
    mask = np.arange(length) < np.array([[length], [3]])
    call = jax.jit(partial(attention, **options))
    plain = call(q, k, v, Rows(mask))
    with right_padded() if right else nullcontext():
        # Traced anew: a new function.
        got = jax.jit(partial(attention, **options))(q, k, v, Rows(mask))
    assert bool(asked) == wanted
    np.testing.assert_array_equal(got, plain)


def test_there_is_no_fused_attention_without_a_gpu() -> None:
    """As here."""
    assert not attention_module.has_fused_attention()
