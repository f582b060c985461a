"""Attention, of every kind that architectures ask for, by whichever kernel is the fastest that is right.

Chosen while a function is traced: by platform, dtype, length and kind. Letters in shapes are those of `layers`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxembed import cpu_kernels, cpu_library
from jaxembed.kernels import available, tokens_there
from jaxembed.plain_attention import attention_in_blocks, in_blocks_pays, places, plain_attention
from jaxembed.tokens import Rows

__all__ = ["FUSED_LENGTH", "attention"]

FUSED_LENGTH = 64
"""Tokens from which the fused kernel is faster than XLA's products (docs/performance.md)."""


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

    Without bias and under `right_padded`, by a kernel that never writes all scores, if there is one that takes it: on a
    GPU cuDNN's, in bfloat16, for rows of `FUSED_LENGTH` tokens and more, without a window to both sides; on TPU
    `row_attention`; on one CPU that of `cpu_kernels`, which takes rows as they lie.
    Otherwise by `plain_attention`; where there is a window that is short beside the row, of blocks of queries with the
    keys around them.

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
    heads = (num_heads, num_key_value_heads or num_heads)
    length, width = rows.length, query.shape[2] // num_heads
    scale = float(width) ** -0.5 if scale is None else scale
    if window is not None and window >= length - 1:
        # Every key is near.
        window = None
    kernels = available()
    if kernels is not None and kernels.cpu_tokens and bias is None and cpu_attention_takes(width):
        told = (rows.starts, rows.lengths, jnp.sum(rows.mask, axis=1, dtype=jnp.int32))
        seen: dict[str, Any] = {"causal": causal, "window": window, "tokens": tokens_there(query)}
        return cpu_kernels.attention(query, key, value, *told, head_dim=width, scale=scale, dtype=dtype, **seen)
    query, key, value = (rows.apart(x) for x in (query, key, value))
    plain = partial(plain_attention, heads=heads, dtype=dtype, scale=scale)
    if bias is None and window is not None and in_blocks_pays(length, causal, window):
        plain = partial(attention_in_blocks, plain, causal=causal, window=window)
    else:
        plain = partial(plain, bias=bias, near=places(length, length, causal, window), blind=window is not None)
    by_platform: dict[str, Callable[..., jax.Array]] = {}
    if kernels is not None and bias is None:
        kind: dict[str, Any] = {"heads": heads, "scale": scale, "causal": causal, "window": window}
        if fused_attention_takes(length, width, dtype, causal, window) and width <= kernels.fused:
            by_platform["cuda"] = partial(fused_attention, **kind)
        if kernels.rows:
            from jaxembed.row_attention import row_attention, row_attention_takes

            if row_attention_takes(length, heads, width, dtype, kernels.mesh):
                by_platform["tpu"] = partial(row_attention, dtype=dtype, mesh=kernels.mesh, **kind)
    if not by_platform:
        return rows.together(plain(query, key, value, rows.mask))
    mixed: jax.Array = jax.lax.platform_dependent(query, key, value, rows.mask, default=plain, **by_platform)
    return rows.together(mixed)


def cpu_attention_takes(width: int) -> bool:
    """Whether the kernel for CPU, which must be there, takes heads of this width."""
    return width % (2 * cpu_library.lanes()) == 0


def fused_attention_takes(length: int, width: int, dtype: jnp.dtype, causal: bool, window: int | None) -> bool:
    """Whether cuDNN has a kernel for this kind of attention, and rows are long enough for it to be the faster one."""
    return dtype == jnp.bfloat16 and width % 8 == 0 and length >= FUSED_LENGTH and (window is None or causal)


def fused_attention(
    query: Float[Array, "B T ND"],
    key: Float[Array, "B S KD"],
    value: Float[Array, "B S KD"],
    mask: Bool[Array, "B S"],
    *,
    heads: tuple[int, int],
    scale: float,
    causal: bool,
    window: int | None,
) -> Float[Array, "B T ND"]:
    """`attention` by cuDNN, in bfloat16. Traced only where there is a GPU: it asks for its version."""
    num_heads, kv_heads = heads
    q, k, v = (
        x.astype(jnp.bfloat16).reshape(*x.shape[:2], count, -1)
        for x, count in ((query, num_heads), (key, kv_heads), (value, kv_heads))
    )
    # A row of padding sees its first token: of no key at all the kernel may make anything. Where no token sees what is
    # behind it, none sees the padding behind its row, and each sees at least itself.
    seen = None if causal else jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.int32), 1)
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        key_value_seq_lengths=seen,
        local_window_size=None if window is None else (window, 0),
        implementation="cudnn",
    )
    return mixed.reshape(query.shape).astype(jnp.float32)
