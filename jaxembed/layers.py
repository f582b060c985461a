"""Layers that two or more architectures use: linear, embedding, norms, activations. Attention is in `attention`.

Matrix products run in the dtype of their weights (float32, or bfloat16 on request) and accumulate in float32; the
residual stream, norms, softmax and biases are float32 always. Letters in shapes: B batch, T length, S key length,
D width, N heads, H head width, F feed-forward, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from jaxembed import cpu_kernels, cpu_library
from jaxembed.errors import UnsupportedModelError
from jaxembed.kernels import cpu_takes, tokens_there

__all__ = [
    "ACTIVATIONS",
    "Embedding",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "activation",
    "by_cpu_kernels",
    "feed_forward",
    "gated_feed_forward",
    "layer_norm",
    "linear",
    "linear_norm",
    "linears",
    "matmul",
    "parameter",
]

FLOAT32 = jnp.dtype("float32")

MASKED = -1e30
"""Score of a key that attention must not see. Finite: a row without any key gives a mean, not NaN."""


def parameter(shape: tuple[int, ...], axes: tuple[str, ...], dtype: str = "float32") -> nnx.Param[jax.Array]:
    """Declare a parameter: shape, logical axis names (see sharding.AXES) and dtype.

    Models are only ever built under `nnx.eval_shape`; the loader puts the values in.
    """
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def matmul(
    spec: str, x: Float[Array, "..."], y: Float[Array, "..."], dtype: jnp.dtype, *, written: jnp.dtype = FLOAT32
) -> Float[Array, "..."]:
    """Einsum with operands in `dtype` and a float32 result, which the product itself may have written in another dtype.

    float32 operands multiply at full precision everywhere: GPU and TPU would otherwise use TF32 or bfloat16 passes.
    """
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    product = jnp.einsum(spec, x.astype(dtype), y.astype(dtype), precision=precision, preferred_element_type=written)
    return product.astype(jnp.float32)


FEW_TOKENS = 96
"""Up to so many tokens a product is computed the other way round on CPU (docs/performance.md)."""

ABREAST = 16
"""In bfloat16 that pays only for a multiple of so many tokens, the numbers that a vector register holds."""


def linear(x: Float[Array, "B T In"], kernel: Float[Array, "Out In"]) -> Float[Array, "B T Out"]:
    """x @ kernel^T, in the dtype of the kernel and with a float32 result.

    XLA's matrix product on CPU repacks its second operand at every call. For few tokens that takes longer than the
    product itself, unless the second operand is the tokens and the kernel the first, whose rows are read as they lie.

    On an NVIDIA GPU a product in bfloat16 is summed up in float32 and written as bfloat16: half the memory to write and
    to read again (docs/performance.md).
    """

    tokens = x.shape[0] * x.shape[1]
    half = kernel.dtype == jnp.bfloat16
    on_cpu = plain_product if tokens > FEW_TOKENS or (half and tokens % ABREAST) else turned_product
    on_gpu = narrow_product if half else plain_product
    if on_cpu is on_gpu:
        return plain_product(x, kernel)
    product: jax.Array = jax.lax.platform_dependent(x, kernel, cpu=on_cpu, cuda=on_gpu, default=plain_product)
    return product


def plain_product(x: Float[Array, "B T In"], kernel: Float[Array, "Out In"]) -> Float[Array, "B T Out"]:
    """x @ kernel^T as it stands."""
    return matmul("BTI,OI->BTO", x, kernel, kernel.dtype)


def turned_product(x: Float[Array, "B T In"], kernel: Float[Array, "Out In"]) -> Float[Array, "B T Out"]:
    """The same as (kernel @ x^T)^T."""
    return jnp.moveaxis(matmul("OI,BTI->OBT", kernel, x, kernel.dtype), 0, -1)


def narrow_product(x: Float[Array, "B T In"], kernel: Float[Array, "Out In"]) -> Float[Array, "B T Out"]:
    """The same, written in the dtype of the kernel."""
    return matmul("BTI,OI->BTO", x, kernel, kernel.dtype, written=kernel.dtype)


class Linear(nnx.Module):
    """y = x @ kernel^T + bias.

    Args:
        size: (input, output) features.
        axes: logical names of input and output.
        dtype: of the kernel, which stands as torch's, [output, input], and so of the product's operands.
        bias: whether there is one.
    """

    def __init__(self, size: tuple[int, int], axes: tuple[str, str], dtype: str, *, bias: bool = True) -> None:
        self.kernel = parameter(size[::-1], axes[::-1], dtype)
        self.bias = parameter(size[1:], axes[1:]) if bias else None

    @property
    def matrix(self) -> cpu_kernels.Product:
        """Kernel and bias."""
        return self.kernel[...], None if self.bias is None else self.bias[...]

    def __call__(self, x: Float[Array, "B T In"], act: str | None = None) -> Float[Array, "B T Out"]:
        """`act`: one of `ACTIVATIONS`, for y."""
        return linears(x, [self], act)[0]


def linears(
    x: Float[Array, "B T In"], layers: Sequence[Linear], act: str | None = None
) -> tuple[Float[Array, "B T _"], ...]:
    """What each of these layers makes of the same x, and an activation of that.

    Up to `Kernels.cpu_tokens` tokens are left to `cpu_kernels`: they read a kernel as it lies, and bias and activation
    are no passes of their own.
    """
    matrices = [layer.matrix for layer in layers]
    if by_cpu_kernels(x, [layer.kernel for layer in layers]):
        inside = act in cpu_kernels.ACTIVATIONS
        results = cpu_kernels.products(x, matrices, act if inside else None, tokens=tokens_there(x))
        act = None if inside else act
    else:
        products = [(linear(x, kernel), bias) for kernel, bias in matrices]
        results = tuple(y if bias is None else y + bias[None, None] for y, bias in products)
    return results if act is None else tuple(map(activation(act), results))


def by_cpu_kernels(x: Shaped[Array, "L M *rest"], weights: Sequence[nnx.Param[jax.Array]]) -> bool:
    """Whether so many tokens are left to `cpu_kernels`, and these matrices or tables are in one of their dtypes."""
    dtypes = {str(one.dtype) for one in weights}
    return cpu_takes(x) and len(dtypes) == 1 and dtypes <= set(cpu_library.DTYPES)


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

    def __init__(self, size: int, eps: float, *, bias: bool = True) -> None:
        self.scale = parameter((size,), ("embed",))
        self.bias = parameter((size,), ("embed",)) if bias else None
        self.eps = eps

    @property
    def numbers(self) -> cpu_kernels.Norm:
        """Scale, bias and eps."""
        return self.scale[...], None if self.bias is None else self.bias[...], self.eps

    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        return layer_norm(x, *self.numbers)


def layer_norm(
    x: Float[Array, "*shape D"], scale: Float[Array, " D"], bias: Float[Array, " D"] | None, eps: float
) -> Float[Array, "*shape D"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(variance + eps) * spread(scale, x.ndim)
    return y if bias is None else y + spread(bias, x.ndim)


def linear_norm(
    x: Float[Array, "B T In"], layer: Linear, residual: Float[Array, "B T Out"], norm: LayerNorm
) -> Float[Array, "B T Out"]:
    """norm(residual + layer(x)); up to `Kernels.cpu_tokens` tokens by one of `cpu_kernels`."""
    if by_cpu_kernels(x, [layer.kernel]):
        return cpu_kernels.linear_norm(x, layer.matrix, residual, norm.numbers, tokens=tokens_there(x))
    return norm(residual + layer(x))


def feed_forward(
    x: Float[Array, "B T D"], up: Linear, act: str, down: Linear, norm: LayerNorm
) -> Float[Array, "B T D"]:
    """norm(x + down(act(up(x)))); likewise by one of `cpu_kernels`, if it has that activation."""
    if act in cpu_kernels.ACTIVATIONS and by_cpu_kernels(x, [up.kernel, down.kernel]):
        return cpu_kernels.feed_forward(x, up.matrix, down.matrix, act, norm.numbers, tokens=tokens_there(x))
    return linear_norm(up(x, act), down, x, norm)


def gated_feed_forward(
    x: Float[Array, "B T D"], gate: Linear, act: str, up: Linear, down: Linear
) -> Float[Array, "B T D"]:
    """down(act(gate(x)) * up(x)); likewise by one of `cpu_kernels`, if it has that activation."""
    if act in cpu_kernels.ACTIVATIONS and by_cpu_kernels(x, [gate.kernel, up.kernel, down.kernel]):
        there = tokens_there(x)
        return cpu_kernels.gated_feed_forward(x, gate.matrix, up.matrix, down.matrix, act, tokens=there)
    gates, inner = linears(x, [gate, up])
    return down(activation(act)(gates) * inner)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (scale + offset) over the last axis, in float32 (https://arxiv.org/abs/1910.07467).

    Args:
        size: D.
        eps: added to the mean square.
        offset: 1 where the checkpoint holds scale - 1, as Gemma's do.
        axis: logical name of the axis; "head_dim" for norms of single heads.
    """

    def __init__(self, size: int, eps: float, *, offset: float = 0.0, axis: str = "embed") -> None:
        self.scale = parameter((size,), (axis,))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        normal = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return normal * spread(self.scale[...] + self.offset, x.ndim)


def spread(vector: Float[Array, " D"], ndim: int) -> Float[Array, "..."]:
    """A vector with axes of size 1 before it, `ndim` in all."""
    return vector.reshape((1,) * (ndim - 1) + vector.shape)


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
    "linear": lambda x: x,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
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
