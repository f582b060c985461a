"""Attention against its formula in float64, and which kernel computes it."""

import itertools
import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal

from jaxembed import make_mesh, plain_attention
from jaxembed.attention import FUSED_LENGTH, attention, fused_attention
from jaxembed.kernel_choice import fused_width
from jaxembed.kernels import Kernels, right_padded
from jaxembed.tokens import Rows

FLOAT32 = jnp.dtype("float32")
BFLOAT16 = jnp.dtype("bfloat16")


def reference_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    mask: np.ndarray,
    heads: int,
    *,
    causal: bool = False,
    window: int | None = None,
) -> np.ndarray:
    """softmax(Q K^T / sqrt(H)) V token by token in float64, over the keys that may be seen only; 0 where none may.

    Heads of keys are as wide as those of queries; where there are fewer, each serves as many of the others.
    """
    out = np.zeros(q.shape)
    rows, length, width = q.shape
    size = width // heads
    share = width // k.shape[2]
    near = np.ones((length, length), bool)
    for place in range(length):
        if causal:
            near[place, place + 1 :] = False
        if window is not None:
            near[place, : max(place - window, 0)] = near[place, place + window + 1 :] = False
    for row, head, place in itertools.product(range(rows), range(heads), range(length)):
        part, of_keys = (slice(n * size, (n + 1) * size) for n in (head, head // share))
        seen = mask[row] & near[place]
        if seen.any():
            keys, values = (x[row, seen, of_keys].astype(np.float64) for x in (k, v))
            scores = keys @ q[row, place, part].astype(np.float64) / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[row, place, part] = weights / weights.sum() @ values
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


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [0, 3, 70, 198, 199, 1000])
@pytest.mark.parametrize("length", [200, 256])
def test_attention_with_a_window(length: int, window: int, causal: bool) -> None:
    """In blocks or not, at the ends and where a block ends; masks with holes, one hiding all that some tokens see."""
    q, k, v = normal(2, length, 8), normal(2, length, 4, seed=1), normal(2, length, 4, seed=2)
    mask = np.random.default_rng(3).random((2, length)) < 0.7
    mask[:, 0] = mask[:, -1] = True
    mask[1, 20:190] = False
    options: dict[str, Any] = {"num_heads": 2, "causal": causal, "window": window}
    call = jax.jit(partial(attention, num_key_value_heads=1, dtype=FLOAT32, **options))
    wanted = reference_attention(q, k, v, mask, 2, causal=causal, window=window)
    np.testing.assert_allclose(call(q, k, v, Rows(mask)), wanted, atol=2e-6)


@pytest.mark.parametrize(("causal", "window"), [(False, 8), (True, 16)])
def test_blocks_look_at_fewer_keys(causal: bool, window: int) -> None:
    """And are used where that is so: no scores of the whole row's size are computed."""
    q = normal(1, 512, 8)
    mask = np.ones((1, 512), bool)

    def scores(window: int) -> list[str]:
        call = jax.jit(partial(attention, num_heads=2, dtype=FLOAT32, causal=causal, window=window))
        return re.findall(r"tensor<(?:[0-9]+x)+512x512xf32>", call.lower(q, q, q, Rows(mask)).as_text())

    assert not scores(window)
    assert scores(400)


def test_gradients_in_blocks() -> None:
    """They are those of the whole."""
    q, k, v = (jnp.asarray(normal(1, 256, 8, seed=seed)) for seed in range(3))
    rows = Rows(jnp.arange(256)[None] < 200)

    def total(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return (attention(q, k, v, rows, num_heads=2, dtype=FLOAT32, window=20) * v).sum()

    got = jax.jit(jax.grad(total, (0, 1, 2)))(q, k, v)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_attention, "BLOCKS_WORTH", 0.0)
        wanted = jax.jit(jax.grad(lambda *x: total(*x), (0, 1, 2)))(q, k, v)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """As if there were a GPU: calls for cuDNN's attention are listed, and answered by XLA's."""
    asked: list[Any] = []
    true = jax.nn.dot_product_attention

    def stand_in(*arrays: Any, implementation: str, **options: Any) -> Any:
        asked.append((implementation, arrays[0].dtype))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return true(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return asked


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 5)])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fused_attention(asked: list[Any], kv_heads: int, causal: bool, window: int | None) -> None:
    """What cuDNN is given means the same: scale, heads, and lengths in place of the mask; no NaN for a row of none."""
    q, k, v = normal(4, 64, 16), normal(4, 64, 8 * kv_heads, seed=1), normal(4, 64, 8 * kv_heads, seed=2)
    mask = np.arange(64) < np.array([[64], [1], [40], [0]])
    kind: dict[str, Any] = {"causal": causal, "window": window}
    got = fused_attention(*map(jnp.asarray, (q, k, v, mask)), heads=(2, kv_heads), scale=8**-0.5, **kind)
    assert asked == [("cudnn", BFLOAT16)]
    assert got.dtype == jnp.float32
    assert np.isfinite(got).all()
    expected = reference_attention(q[:3], k[:3], v[:3], mask[:3], 2, **kind)
    # Of a causal row only its own tokens count: what is behind them sees the padding.
    own = mask[:3] if causal else np.ones((3, 64), bool)
    np.testing.assert_allclose(np.asarray(got)[:3][own], expected[own], atol=0.03)


@pytest.mark.parametrize(
    ("wanted", "options"),
    [
        (True, {}),
        (False, {"dtype": FLOAT32}),
        (True, {"causal": True}),
        (True, {"causal": True, "window": 8}),
        (True, {"window": FUSED_LENGTH - 1}),
        (False, {"window": FUSED_LENGTH - 2}),
        (False, {"bias": jnp.zeros((1, 2, FUSED_LENGTH, FUSED_LENGTH))}),
        (True, {"num_key_value_heads": 1}),
        (False, {"num_heads": 4}),
        (False, {"num_heads": 1, "width": 136}),
        (False, {"length": FUSED_LENGTH - 1}),
        (False, {"right": False}),
    ],
)
def test_when_attention_is_fused(asked: list[Any], wanted: bool, options: dict[str, Any]) -> None:
    """Where the kernel takes it and it pays; not with a mask that may have holes. And only on a GPU: here it is not."""
    length, right = options.pop("length", FUSED_LENGTH), options.pop("right", True)
    width = options.pop("width", 16)
    options = {"num_heads": 2, "dtype": BFLOAT16} | options
    heads, kv_heads = options["num_heads"], options.get("num_key_value_heads", options["num_heads"])
    q = normal(2, length, width)
    k, v = (normal(2, length, width * kv_heads // heads, seed=seed) for seed in (1, 2))
    mask = np.arange(length) < np.array([[length], [3]])
    call = jax.jit(partial(attention, **options))
    plain = call(q, k, v, Rows(mask))
    with right_padded(Kernels(make_mesh(jax.devices()[:1]), fused=128)) if right else nullcontext():
        # Traced anew: a new function.
        got = jax.jit(partial(attention, **options))(q, k, v, Rows(mask))
    assert bool(asked) == wanted
    np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize(
    ("capabilities", "width"), [(["9.0"], 256), (["8.9"], 128), (["10.3", "8.0"], 128), (["7.5", "9.0"], 0)]
)
def test_the_width_of_heads_is_what_all_gpus_take(capabilities: list[str], width: int) -> None:
    """The oldest of them decides."""
    assert fused_width(capabilities) == width
