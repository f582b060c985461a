"""Layers that two or more architectures use: linear, embedding, norms, activations, attention.

Matrix products run in the dtype of their weights (float32, or bfloat16 on request) and accumulate in float32; the
residual stream, norms, softmax and biases are float32 always. Letters in shapes: B batch, T length, S key length,
D width, N heads, H head width, F feed-forward, V vocabulary.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxembed.errors import UnsupportedModelError

__all__ = ["ACTIVATIONS", "Embedding", "LayerNorm", "Linear", "activation", "attention", "matmul", "parameter"]

MASKED = -1e30
"""Score of a key that must not be seen. Finite: a row without any key gives a mean, not NaN."""


def parameter(shape: tuple[int, ...], axes: tuple[str, ...], dtype: str = "float32") -> nnx.Param[jax.Array]:
    """Declare a parameter: shape, logical axis names (see sharding.AXES) and dtype.

    Models are only ever built under `nnx.eval_shape`; the loader puts the values in.
    """
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def matmul(spec: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """Einsum with operands in `dtype` and a float32 result.

    float32 operands multiply at full precision everywhere: GPU and TPU would otherwise use TF32 or bfloat16 passes.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """y = x @ kernel + bias.

    Args:
        size: (input, output) features.
        axes: logical names of the kernel's two axes.
        dtype: of the kernel and so of the product's operands.
        bias: whether there is one.
    """

    def __init__(self, size: tuple[int, int], axes: tuple[str, str], dtype: str, *, bias: bool = True) -> None:
        self.kernel = parameter(size, axes, dtype)
        self.bias = parameter(size[1:], axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "B T In"]) -> Float[Array, "B T Out"]:
        kernel = self.kernel[...]
        y = matmul("BTI,IO->BTO", x, kernel, kernel.dtype)
        return y if self.bias is None else y + self.bias[...][None, None]


class Embedding(nnx.Module):
    """A table of vectors, looked up by id.

    Args:
        size: (rows, D).
        axes: logical names of the two axes.
        dtype: of the table; the result is float32.
    """

    def __init__(self, size: tuple[int, int], axes: tuple[str, str], dtype: str) -> None:
        self.table = parameter(size, axes, dtype)

    def __call__(self, ids: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
        # "clip" reads the table as it is; the default fills NaN and costs a comparison per id. Ids are checked on
        # the host, where an error can name them.
        return jnp.take(self.table[...], ids, axis=0, mode="clip").astype(jnp.float32)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in float32 (https://arxiv.org/abs/1607.06450)."""

    def __init__(self, size: int, eps: float) -> None:
        self.scale = parameter((size,), ("embed",))
        self.bias = parameter((size,), ("embed",))
        self.eps = eps

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...][None, None] + self.bias[...][None, None]


Activation = Callable[[jax.Array], jax.Array]

SQRT_HALF = 0.5**0.5


def exact_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * Phi(x) by erf (https://arxiv.org/abs/1606.08415), as torch computes it.

    jax.nn.gelu goes by erfc, which takes nearly twice as long on CPU.
    """
    return 0.5 * x * (1.0 + jax.lax.erf(x * SQRT_HALF))


ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": exact_gelu,
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}
"""Hugging Face's names; "gelu" is the exact one."""


def activation(name: str) -> Activation:
    """The function of a name in config.json.

    Raises:
        UnsupportedModelError: no such activation here.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        raise UnsupportedModelError(f"the activation is {name!r}; supported: {', '.join(ACTIVATIONS)}") from None


def attention(
    query: Float[Array, "B T ND"],
    key: Float[Array, "B S ND"],
    value: Float[Array, "B S ND"],
    mask: Bool[Array, "B S"],
    *,
    num_heads: int,
    dtype: jnp.dtype,
) -> Float[Array, "B T ND"]:
    """Scaled dot-product attention, softmax(Q K^T / sqrt(H)) V (https://arxiv.org/abs/1706.03762).

    Args:
        query, key, value: heads side by side in the last axis, float32.
        mask: keys that may be seen.
        num_heads: N.
        dtype: of the products' operands.

    Returns:
        float32, heads side by side again.
    """
    q, k, v = (split_heads(x, num_heads) for x in (query, key, value))
    scale = float(q.shape[-1]) ** -0.5
    scores = matmul("BNTH,BNSH->BNTS", q * scale, k, dtype)
    scores = jnp.where(mask[:, None, None, :], scores, MASKED)
    # The division waits until after the product with V: XLA fuses this form best on CPU (docs/numerics.md).
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    mixed = matmul("BNTS,BNSH->BNTH", weights, v, dtype) / jnp.sum(weights, axis=-1, keepdims=True)
    return jnp.swapaxes(mixed, 1, 2).reshape(query.shape)


def split_heads(x: Float[Array, "B T ND"], num_heads: int) -> Float[Array, "B N T H"]:
    """Heads out of the last axis, to the second."""
    batch, length, width = x.shape
    return jnp.swapaxes(x.reshape(batch, length, num_heads, width // num_heads), 1, 2)
