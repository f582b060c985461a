"""Each layer against its formula in float64 or against torch."""

import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.activations import ACT2FN

from jaxembed import layers
from jaxembed.errors import UnsupportedModelError
from jaxembed.layers import (
    ACTIVATIONS,
    FEW_TOKENS,
    FUSED_LENGTH,
    Embedding,
    LayerNorm,
    Linear,
    activation,
    attention,
    linear,
    matmul,
    right_padded,
)

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
@pytest.mark.parametrize("keys", [7, 10])
def test_attention(heads: int, keys: int) -> None:
    """Several head counts; as many keys as queries, or more; masks with holes."""
    q, k, v = normal(3, 7, 12), normal(3, keys, 12, seed=1), normal(3, keys, 12, seed=2)
    mask = np.random.default_rng(3).random((3, keys)) < 0.6
    mask[:, 2] = True
    got = jax.jit(lambda *a: attention(*a, num_heads=heads, dtype=FLOAT32))(q, k, v, mask)
    np.testing.assert_allclose(got, reference_attention(q, k, v, mask, heads), atol=1e-6)


def test_attention_does_not_overflow() -> None:
    """Scores of thousands: the greatest is taken off before the exponential."""
    q, k, v = 100 * normal(1, 4, 8), 100 * normal(1, 4, 8, seed=1), normal(1, 4, 8, seed=2)
    mask = np.ones((1, 4), bool)
    got = attention(*map(jnp.asarray, (q, k, v, mask)), num_heads=2, dtype=FLOAT32)
    np.testing.assert_allclose(got, reference_attention(q, k, v, mask, 2), atol=1e-4)


def test_masked_keys_have_no_weight_at_all() -> None:
    """Whatever stands in them, the result is the same to the last bit."""
    q, k, v = normal(2, 5, 8), normal(2, 5, 8, seed=1), normal(2, 5, 8, seed=2)
    mask = np.array([[True, True, False, True, False], [True, False, False, False, False]])
    hidden = ~mask[:, :, None]
    compute = jax.jit(lambda k, v: attention(jnp.asarray(q), k, v, jnp.asarray(mask), num_heads=2, dtype=FLOAT32))
    plain = compute(k, v)
    np.testing.assert_array_equal(plain, compute(np.where(hidden, 1e3, k), np.where(hidden, -1e3, v)))
    # A single visible key is copied.
    np.testing.assert_allclose(plain[1], np.broadcast_to(v[1, 0], (5, 8)), atol=1e-7)


def test_a_row_without_any_key_is_finite() -> None:
    """Rows of padding are thrown away; they must not poison a gradient or a debugger with NaN."""
    q, k, v = (jnp.asarray(normal(2, 4, 8, seed=seed)) for seed in range(3))
    mask = jnp.asarray([[True] * 4, [False] * 4])

    def total(q: jax.Array) -> jax.Array:
        return attention(q, k, v, mask, num_heads=2, dtype=FLOAT32).sum()

    assert np.isfinite(attention(q, k, v, mask, num_heads=2, dtype=FLOAT32)).all()
    assert np.isfinite(jax.grad(total)(q)).all()


def test_attention_in_bfloat16_returns_float32() -> None:
    """On CPU it computes in float32; elsewhere both products round to bfloat16, sums do not."""
    q, k, v = normal(1, 6, 8), normal(1, 6, 8, seed=1), normal(1, 6, 8, seed=2)
    mask = np.array([[True, True, False, True, True, False]])
    call = jax.jit(partial(attention, num_heads=2, dtype=BFLOAT16))
    got = call(q, k, v, mask)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, reference_attention(q, k, v, mask, 2), atol=1e-6)
    for platform, products in (("cpu", 0), ("cuda", 2), ("tpu", 2)):
        text = call.trace(q, k, v, mask).lower(lowering_platforms=(platform,)).as_text()
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

    monkeypatch.setattr(layers, "has_fused_attention", lambda: True)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    return asked


def test_fused_attention(asked: list[Any]) -> None:
    """What cuDNN is given means the same: scale, heads, and lengths in place of the mask; no NaN for a row of none."""
    q, k, v = normal(4, 64, 16), normal(4, 64, 16, seed=1), normal(4, 64, 16, seed=2)
    mask = np.arange(64) < np.array([[64], [1], [40], [0]])
    got = layers.fused_attention(*map(jnp.asarray, (q, k, v, mask)), num_heads=2, scale=8**-0.5)
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
    plain = call(q, k, v, mask)
    with right_padded() if right else nullcontext():
        # Traced anew: a new function.
        got = jax.jit(partial(attention, **options))(q, k, v, mask)
    assert bool(asked) == wanted
    np.testing.assert_array_equal(got, plain)


def test_there_is_no_fused_attention_without_a_gpu() -> None:
    """As here."""
    assert not layers.has_fused_attention()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_transformers_own(name: str) -> None:
    """Every name in the table means what it means there; "gelu" is the exact one."""
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -0.0, 1e-20, 50.0, -50.0]]).astype(np.float32)
    expected = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(jax.jit(activation(name))(x), expected, atol=1e-6, rtol=1e-6)


def test_exact_gelu_is_not_the_tanh_one() -> None:
    """They differ by up to 5e-4: a swap of the two must show."""
    x = jnp.linspace(-3.0, 3.0, 101)
    assert np.abs(activation("gelu")(x) - activation("gelu_new")(x)).max() > 1e-4


def test_an_unknown_activation() -> None:
    """Named, with the list of those there are."""
    with pytest.raises(UnsupportedModelError, match="activation is 'mish'; supported: gelu, gelu_new"):
        activation("mish")


@pytest.mark.parametrize("length", [4, FEW_TOKENS // 2, FEW_TOKENS // 2 + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool, length: int) -> None:
    """x @ kernel^T + bias, whichever way round it is computed, and whether compiled or not."""
    layer = Linear((5, 3), ("embed", "mlp"), "float32", bias=bias)
    layer.kernel[...] = jnp.asarray(normal(3, 5))
    x = normal(2, length, 5, seed=1)
    expected = x.astype(np.float64) @ normal(3, 5).T
    if bias:
        layer.bias[...] = jnp.asarray(normal(3, seed=2))
        expected = expected + normal(3, seed=2)
    assert (layer.bias is not None) == bias
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-6)
    graph, state = nnx.split(layer)
    compiled = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    np.testing.assert_allclose(compiled(state, jnp.asarray(x)), expected, atol=1e-6)


@pytest.mark.parametrize("length", [15, 16, 17, 32])
def test_linear_in_bfloat16(length: int) -> None:
    """Operands are rounded, sums are not, whichever way round it is computed."""
    kernel = jnp.asarray(normal(3, 5), BFLOAT16)
    x = normal(1, length, 5, seed=1)
    rounded = np.asarray(jnp.asarray(x, BFLOAT16), np.float64)
    got = jax.jit(linear)(x, kernel)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, rounded @ np.asarray(kernel, np.float64).T, atol=1e-6)


def test_linear_in_bfloat16_on_a_gpu_writes_bfloat16() -> None:
    """The result of the product is half as large there; what is returned is float32 all the same."""
    call = jax.jit(linear)
    for platform, written in (("cpu", "f32"), ("cuda", "bf16"), ("tpu", "f32")):
        traced = call.trace(normal(2, 16, 5), jnp.asarray(normal(3, 5), BFLOAT16))
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = re.findall(r"dot_general.*xbf16>, tensor<[0-9x]*xbf16>\) -> tensor<[0-9x]*x(\w+)>", text)
        assert products == [written]
        assert traced.out_info.dtype == jnp.float32


def test_parameters_carry_their_axes_and_dtype() -> None:
    """Matrices in the dtype asked for, everything else in float32; each dimension with a logical name."""
    layer = Linear((5, 3), ("embed", "mlp"), "bfloat16")
    assert (layer.kernel.dtype, layer.kernel.get_metadata("axes")) == (BFLOAT16, ("mlp", "embed"))
    assert (layer.bias.dtype, layer.bias.get_metadata("axes")) == (FLOAT32, ("mlp",))
    norm = LayerNorm(5, 1e-6)
    assert norm.scale.dtype == norm.bias.dtype == FLOAT32
    assert norm.scale.get_metadata("axes") == norm.bias.get_metadata("axes") == ("embed",)


def test_matmul_takes_operands_in_its_dtype_and_returns_float32() -> None:
    """bfloat16 operands accumulate in float32: 1 + 2**-9 is lost in an operand, a sum of 300 ones is not."""
    ones = jnp.ones((1, 300), jnp.float32)
    product = matmul("IK,JK->IJ", ones, ones, BFLOAT16)
    assert product.dtype == jnp.float32
    assert product[0, 0] == 300.0
    fine = jnp.full((1, 1), 1.0 + 2.0**-9, jnp.float32)
    assert matmul("IK,JK->IJ", fine, jnp.ones((1, 1)), BFLOAT16)[0, 0] == 1.0
    assert matmul("IK,JK->IJ", fine, jnp.ones((1, 1)), FLOAT32)[0, 0] == 1.0 + 2.0**-9


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_layer_norm(eps: float) -> None:
    """As torch's, with an eps large enough to tell that it stands inside the root; a constant row gives the bias."""
    x = np.concatenate([normal(1, 3, 8), np.full((1, 3, 8), 7.0, np.float32)])
    norm = LayerNorm(8, eps)
    norm.scale[...] = jnp.asarray(normal(8, seed=1))
    norm.bias[...] = jnp.asarray(normal(8, seed=2))
    weight, bias = torch.from_numpy(normal(8, seed=1)), torch.from_numpy(normal(8, seed=2))
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (8,), weight, bias, eps).numpy()
    got = norm(jnp.asarray(x))
    np.testing.assert_allclose(got, expected, atol=2e-6)
    np.testing.assert_allclose(got[1], np.broadcast_to(bias.numpy(), (3, 8)), atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding(dtype: str) -> None:
    """Rows of the table by id, in float32 whatever the table is held in, for ids of any shape."""
    table = normal(6, 4)
    layer = Embedding((6, 4), ("vocab", "embed"), dtype)
    layer.table[...] = jnp.asarray(table, dtype)
    ids = np.array([[0, 5], [3, 3]], np.int32)
    got = layer(jnp.asarray(ids))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, np.asarray(jnp.asarray(table, dtype).astype(jnp.float32))[ids])
    assert layer(jnp.zeros((), jnp.int32)).shape == (4,)
