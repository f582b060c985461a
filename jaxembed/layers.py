"""Layers that two or more architectures use: linear, embedding, norms, activations, attention.

Matrix products run in the dtype of their weights (float32, or bfloat16 on request) and accumulate in float32; the
residual stream, norms, softmax and biases are float32 always. Letters in shapes: B batch, T length, S key length,
D width, N heads, H head width, F feed-forward, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxembed.errors import UnsupportedModelError
from jaxembed.types import NO_TASK

__all__ = [
    "ACTIVATIONS",
    "FUSED_LENGTH",
    "Embedding",
    "LayerNorm",
    "Linear",
    "RMSNorm",
    "Tokens",
    "activation",
    "attention",
    "linear",
    "matmul",
    "parameter",
    "right_padded",
    "split_heads",
]

FLOAT32 = jnp.dtype("float32")

MASKED = -1e30
"""Score of a key that must not be seen. Finite: a row without any key gives a mean, not NaN."""


class Tokens(NamedTuple):
    """What an encoder is called with.

    Attributes:
        input_ids: token ids; what stands in the padding is arbitrary.
        mask: tokens that are not padding. Padding is on the right in everything this project makes.
        token_types: 0, or 1 for the second text of a pair.
        tasks: which task each row asks for (`Architecture.tasks`); negative for none.
    """

    input_ids: Int[Array, "B T"]
    mask: Bool[Array, "B T"]
    token_types: Int[Array, "B T"]
    tasks: Int[Array, " B"]

    @classmethod
    def plain(cls, input_ids: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> "Tokens":
        """Single texts that ask for no task."""
        return cls(input_ids, mask, jnp.zeros_like(input_ids), jnp.full(input_ids.shape[:1], NO_TASK, jnp.int32))


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

    def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return matmul("BTI,OI->BTO", x, kernel, kernel.dtype)

    def turned(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.moveaxis(matmul("OI,BTI->OBT", kernel, x, kernel.dtype), 0, -1)

    def narrow(x: jax.Array, kernel: jax.Array) -> jax.Array:
        product = jnp.einsum("BTI,OI->BTO", x.astype(kernel.dtype), kernel, preferred_element_type=kernel.dtype)
        return product.astype(jnp.float32)

    tokens = x.shape[0] * x.shape[1]
    half = kernel.dtype == jnp.bfloat16
    on_cpu = plain if tokens > FEW_TOKENS or (half and tokens % ABREAST) else turned
    on_gpu = narrow if half else plain
    if on_cpu is on_gpu:
        return plain(x, kernel)
    product: jax.Array = jax.lax.platform_dependent(x, kernel, cpu=on_cpu, cuda=on_gpu, default=plain)
    return product


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

    def __call__(self, x: Float[Array, "B T In"]) -> Float[Array, "B T Out"]:
        y = linear(x, self.kernel[...])
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

    def __init__(self, size: int, eps: float, *, bias: bool = True) -> None:
        self.scale = parameter((size,), ("embed",))
        self.bias = parameter((size,), ("embed",)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * spread(self.scale[...], x.ndim)
        return y if self.bias is None else y + spread(self.bias[...], x.ndim)


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


def attention(
    query: Float[Array, "B T ND"],
    key: Float[Array, "B S KD"],
    value: Float[Array, "B S KD"],
    mask: Bool[Array, "B S"],
    *,
    num_heads: int,
    dtype: jnp.dtype,
    num_key_value_heads: int | None = None,
    scale: float | None = None,
    bias: Float[Array, "_ N T S"] | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Float[Array, "B T ND"]:
    """Scaled dot-product attention, softmax(Q K^T * scale + bias) V (https://arxiv.org/abs/1706.03762).

    On a GPU in bfloat16, for rows of `FUSED_LENGTH` tokens and more, by cuDNN's fused kernel, which never writes the
    scores: if each query sees all keys of the mask and has a head of keys of its own, and under `right_padded`.
    Otherwise by products that XLA compiles.

    Args:
        query, key, value: heads side by side in the last axis, float32.
        mask: keys that may be seen.
        num_heads: N.
        dtype: of the products' operands.
        num_key_value_heads: K, which divides N: each key and value head serves N / K query heads
            (https://arxiv.org/abs/2305.13245). By default N.
        scale: by default 1 / sqrt(H).
        bias: added to the scores; its first axis is B or 1.
        causal: a query sees no key behind its own place.
        window: a query sees keys at most this many places away, on either side: an inclusive radius.

    Returns:
        float32, heads side by side again.
    """
    kv_heads = num_key_value_heads or num_heads
    width = query.shape[2] // num_heads
    scale = float(width) ** -0.5 if scale is None else scale
    plain = partial(
        plain_attention, heads=(num_heads, kv_heads), dtype=dtype, scale=scale, bias=bias, causal=causal, window=window
    )
    full = bias is None and window is None and not causal and kv_heads == num_heads
    takes = dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128 and query.shape[1] >= FUSED_LENGTH
    if not (full and takes and RIGHT_PADDED.get() and has_fused_attention()):
        return plain(query, key, value, mask)
    fused = partial(fused_attention, num_heads=num_heads, scale=scale)
    mixed: jax.Array = jax.lax.platform_dependent(query, key, value, mask, cuda=fused, default=plain)
    return mixed


FUSED_LENGTH = 64
"""Tokens from which the fused kernel is faster than XLA's products (docs/performance.md)."""


RIGHT_PADDED: ContextVar[bool] = ContextVar("RIGHT_PADDED", default=False)


@contextmanager
def right_padded() -> Iterator[None]:
    """While a function is traced in here, each mask holds the first tokens of its rows, as it does for every Batch.

    A kernel that is told how many keys there are, and not which, may then be used.
    """
    before = RIGHT_PADDED.set(True)
    try:
        yield
    finally:
        RIGHT_PADDED.reset(before)


@lru_cache(maxsize=1)
def has_fused_attention() -> bool:
    """Whether this process has NVIDIA GPUs that cuDNN's fused attention runs on: Ampere or newer."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError:
        return False
    return all(float(device.compute_capability) >= 8.0 for device in devices)


def fused_attention(
    query: Float[Array, "B T ND"],
    key: Float[Array, "B S ND"],
    value: Float[Array, "B S ND"],
    mask: Bool[Array, "B S"],
    *,
    num_heads: int,
    scale: float,
) -> Float[Array, "B T ND"]:
    """`attention` by cuDNN, in bfloat16. Traced only where there is a GPU: it asks for its version."""
    q, k, v = (x.astype(jnp.bfloat16).reshape(*x.shape[:2], num_heads, -1) for x in (query, key, value))
    # A row of padding sees its first token: of no key at all the kernel may make anything.
    seen = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
    mixed = jax.nn.dot_product_attention(q, k, v, scale=scale, key_value_seq_lengths=seen, implementation="cudnn")
    return mixed.reshape(query.shape).astype(jnp.float32)


def plain_attention(
    query: Float[Array, "B T ND"],
    key: Float[Array, "B S KD"],
    value: Float[Array, "B S KD"],
    mask: Bool[Array, "B S"],
    *,
    heads: tuple[int, int],
    dtype: jnp.dtype,
    scale: float,
    bias: Float[Array, "_ N T S"] | None,
    causal: bool,
    window: int | None,
) -> Float[Array, "B T ND"]:
    """`attention` by products that XLA compiles; `heads` of the queries, and of keys and values."""
    num_heads, kv_heads = heads
    q, k, v = split_heads(query, num_heads), split_heads(key, kv_heads), split_heads(value, kv_heads)
    if kv_heads != num_heads:
        k, v = (jnp.repeat(x, num_heads // kv_heads, axis=1) for x in (k, v))
    scores = masked_scores(q * scale, k, mask, dtype)
    if bias is not None:
        scores = scores + jnp.broadcast_to(bias, scores.shape)
    near = places(query.shape[1], key.shape[1], causal, window)
    if near is not None:
        scores = jnp.where(near[None, None], scores, MASKED)
    weights, total = soften(scores)
    # The division waits until after the product with V: XLA fuses this form best on CPU (docs/numerics.md).
    mixed = weighted(weights, v, dtype) / total
    if near is not None and window is not None:
        # A query too far from every key, as one behind the padding's beginning may be, gets nothing, as in torch.
        seen = mask[:, None, None, :] & near[None, None]
        mixed = jnp.where(jnp.any(seen, axis=-1)[..., None], mixed, 0.0)
    return jnp.swapaxes(mixed, 1, 2).reshape(query.shape)


def masked_scores(
    q: Float[Array, "B N T H"], k: Float[Array, "B N S H"], mask: Bool[Array, "B S"], dtype: jnp.dtype
) -> Float[Array, "B N T S"]:
    """q k^T, and `MASKED` where a key must not be seen.

    On CPU the mask is one more feature of the keys, `MASKED` or 0, and the queries have a 1 there: a pass over all
    scores less, which for long rows are more than a core's cache holds (docs/performance.md). And the product is in
    float32 whatever `dtype` says: XLA has none of bfloat16 for heads there, and would round to it only to compute in
    float32 after all.
    """

    def chosen(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask[:, None, None, :], matmul("BNTH,BNSH->BNTS", q, k, dtype), MASKED)

    def added(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = jnp.broadcast_to(jnp.where(mask, 0.0, MASKED)[:, None, :, None], (*k.shape[:3], 1))
        ones = jnp.ones((*q.shape[:3], 1), q.dtype)
        keys = jnp.concatenate([k, hidden], axis=-1)
        return matmul("BNTH,BNSH->BNTS", jnp.concatenate([q, ones], axis=-1), keys, FLOAT32)

    scores: jax.Array = jax.lax.platform_dependent(q, k, mask, cpu=added, default=chosen)
    return scores


def weighted(weights: Float[Array, "B N T S"], v: Float[Array, "B N S H"], dtype: jnp.dtype) -> Float[Array, "B N T H"]:
    """Sums of the values by weights; on CPU in float32, as the scores."""
    product: jax.Array = jax.lax.platform_dependent(
        weights,
        v,
        cpu=partial(matmul, "BNTS,BNSH->BNTH", dtype=FLOAT32),
        default=partial(matmul, "BNTS,BNSH->BNTH", dtype=dtype),
    )
    return product


def soften(scores: Float[Array, "B N T S"]) -> tuple[Float[Array, "B N T S"], Float[Array, "B N T 1"]]:
    """exp of the scores less their maximum, and its sum: softmax before the division."""
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return weights, jnp.sum(weights, axis=-1, keepdims=True)


def places(queries: int, keys: int, causal: bool, window: int | None) -> Bool[Array, "T S"] | None:
    """Which key each query may see by its place alone; None if all."""
    if not causal and window is None:
        return None
    distance = jnp.arange(keys, dtype=jnp.int32)[None, :] - jnp.arange(queries, dtype=jnp.int32)[:, None]
    seen = distance <= 0 if causal else jnp.ones((queries, keys), bool)
    return seen if window is None else seen & (jnp.abs(distance) <= window)


def split_heads(x: Float[Array, "B T ND"], num_heads: int) -> Float[Array, "B N T H"]:
    """Heads out of the last axis, to the second."""
    batch, length, width = x.shape
    return jnp.swapaxes(x.reshape(batch, length, num_heads, width // num_heads), 1, 2)
