"""Each layer against its formula in float64 or against torch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from arrays import normal
from flax import nnx
from transformers.activations import ACT2FN

from jaxembed.errors import UnsupportedModelError
from jaxembed.layers import (
    ACTIVATIONS,
    FEW_TOKENS,
    Embedding,
    LayerNorm,
    Linear,
    activation,
    linear,
    matmul,
)

FLOAT32 = jnp.dtype("float32")
BFLOAT16 = jnp.dtype("bfloat16")


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
