"""Attention, of every kind that architectures ask for, by whichever kernel is the fastest that is right.

Chosen while a function is traced: by platform, dtype, length and kind. Letters in shapes are those of `layers`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxembed.layers import FLOAT32, matmul
from jaxembed.tokens import Rows

__all__ = ["FUSED_LENGTH", "attention", "right_padded", "split_heads"]

MASKED = -1e30
"""Score of a key that must not be seen. Finite: a row without any key gives a mean, not NaN."""

FUSED_LENGTH = 64
"""Tokens from which the fused kernel is faster than XLA's products (docs/performance.md)."""

RIGHT_PADDED: ContextVar[bool] = ContextVar("RIGHT_PADDED", default=False)


def attention(
    query: Float[Array, "L M ND"],
    key: Float[Array, "L M KD"],
    value: Float[Array, "L M KD"],
    rows: Rows,
    *,
    num_heads: int,
    dtype: jnp.dtype,
    num_key_value_heads: int | None = None,
    scale: float | None = None,
    bias: Float[Array, "_ N T S"] | None = None,
    causal: bool = False,
    window: int | None = None,
) -> Float[Array, "L M ND"]:
    """Scaled dot-product attention, softmax(Q K^T * scale + bias) V (https://arxiv.org/abs/1706.03762).

    On a GPU in bfloat16, for rows of `FUSED_LENGTH` tokens and more, by cuDNN's fused kernel, which never writes the
    scores: if each query sees all keys of the mask and has a head of keys of its own, and under `right_padded`.
    Otherwise by products that XLA compiles.

    Args:
        query, key, value: heads side by side in the last axis, float32.
        rows: where the rows stand, and which keys of each may be seen.
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
    query, key, value = (rows.apart(x) for x in (query, key, value))
    width = query.shape[2] // num_heads
    scale = float(width) ** -0.5 if scale is None else scale
    plain = partial(
        plain_attention, heads=(num_heads, kv_heads), dtype=dtype, scale=scale, bias=bias, causal=causal, window=window
    )
    full = bias is None and window is None and not causal and kv_heads == num_heads
    takes = dtype == jnp.bfloat16 and width % 8 == 0 and width <= 128 and query.shape[1] >= FUSED_LENGTH
    if not (full and takes and RIGHT_PADDED.get() and has_fused_attention()):
        return rows.together(plain(query, key, value, rows.mask))
    fused = partial(fused_attention, num_heads=num_heads, scale=scale)
    mixed: jax.Array = jax.lax.platform_dependent(query, key, value, rows.mask, cuda=fused, default=plain)
    return rows.together(mixed)


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
