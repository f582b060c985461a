"""Attention, of every kind that architectures ask for, by whichever kernel is the fastest that is right.

Chosen while a function is traced: by platform, dtype, length and kind. Letters in shapes are those of `layers`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from jaxembed.layers import FLOAT32, MASKED, matmul
from jaxembed.tokens import Rows

__all__ = ["FUSED_LENGTH", "Kernels", "attention", "right_padded", "split_heads"]

FUSED_LENGTH = 64
"""Tokens from which the fused kernel is faster than XLA's products (docs/performance.md)."""

LEAST_BLOCK = 64
"""Queries that a block has at least: products of fewer are slow."""

BLOCKS_WORTH = 0.75
"""Which share of all keys blocks may look at, to be used."""

RIGHT_PADDED: ContextVar["Kernels | None"] = ContextVar("RIGHT_PADDED", default=None)


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

    Without bias and under `right_padded`, by a kernel that never writes the scores, if there is one that takes it: on a
    GPU cuDNN's, in bfloat16, for rows of `FUSED_LENGTH` tokens and more, without a window to both sides; on TPU
    `row_attention`. Otherwise by products that XLA compiles; where there is a window that is short beside the row, of
    blocks of queries with the keys around them.

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
    query, key, value = (rows.apart(x) for x in (query, key, value))
    length, width = query.shape[1], query.shape[2] // num_heads
    scale = float(width) ** -0.5 if scale is None else scale
    if window is not None and window >= length - 1:
        # Every key is near.
        window = None
    plain = partial(plain_attention, heads=heads, dtype=dtype, scale=scale)
    if bias is None and window is not None and in_blocks_pays(length, causal, window):
        plain = partial(attention_in_blocks, plain, causal=causal, window=window)
    else:
        plain = partial(plain, bias=bias, near=places(length, length, causal, window), blind=window is not None)
    by_platform: dict[str, Callable[..., jax.Array]] = {}
    kernels = RIGHT_PADDED.get()
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


class Kernels(NamedTuple):
    """What can compute attention on the devices of a mesh, beside XLA.

    Attributes:
        mesh: the devices.
        fused: features of the widest head that cuDNN's fused attention takes there; 0 if it takes none.
        rows: whether `row_attention` works there.
    """

    mesh: Mesh
    fused: int
    rows: bool

    @classmethod
    def on(cls, mesh: Mesh, dtype: str) -> "Kernels":
        """Find out. Not while anything is traced: on TPU it is tried.

        Args:
            mesh: the devices.
            dtype: of the products' operands.
        """
        devices = list(mesh.devices.flat)
        platform, fused, rows = devices[0].platform, 0, False
        if platform == "gpu":
            fused = fused_width([device.compute_capability for device in devices])
        if platform == "tpu":
            # Only there: Pallas takes half a second and 22 MB.
            from jaxembed.row_attention import row_attention_works

            rows = row_attention_works(devices[0], dtype)
        return cls(mesh, fused, rows)


@contextmanager
def right_padded(kernels: Kernels) -> Iterator[None]:
    """While a function is traced in here, each mask holds the first tokens of its rows, as it does for every Batch.

    Kernels that are told how many keys there are, and not which, may then be used.
    """
    before = RIGHT_PADDED.set(kernels)
    try:
        yield
    finally:
        RIGHT_PADDED.reset(before)


def fused_width(capabilities: Sequence[str]) -> int:
    """Features of the widest head that cuDNN's fused attention takes; 0 if it takes none.

    Args:
        capabilities: of each GPU, such as "9.0".
    """
    least = min(map(float, capabilities))
    if least < 8.0:
        return 0
    return 128 if least < 9.0 else 256


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


def plain_attention(
    query: Float[Array, "B T ND"],
    key: Float[Array, "B S KD"],
    value: Float[Array, "B S KD"],
    mask: Bool[Array, "B S"],
    *,
    heads: tuple[int, int],
    dtype: jnp.dtype,
    scale: float,
    bias: Float[Array, "_ N T S"] | None = None,
    near: Bool[Array, "T S"] | None = None,
    blind: bool = False,
) -> Float[Array, "B T ND"]:
    """`attention` by products that XLA compiles.

    Args:
        heads: of the queries, and of keys and values.
        near: which keys a query may see by its place; None for all.
        blind: whether that may be none that the mask shows.
    """
    num_heads, kv_heads = heads
    q, k, v = split_heads(query, num_heads), split_heads(key, kv_heads), split_heads(value, kv_heads)
    if kv_heads != num_heads:
        k, v = (jnp.repeat(x, num_heads // kv_heads, axis=1) for x in (k, v))
    scores = masked_scores(q * scale, k, mask, dtype)
    if bias is not None:
        scores = scores + jnp.broadcast_to(bias, scores.shape)
    if near is not None:
        scores = jnp.where(near[None, None], scores, MASKED)
    weights, total = soften(scores)
    # The division waits until after the product with V: XLA fuses this form best on CPU (docs/numerics.md).
    mixed = weighted(weights, v, dtype) / total
    if near is not None and blind:
        # A query too far from every key, as one behind the padding's beginning may be, gets nothing, as in torch.
        seen = mask[:, None, None, :] & near[None, None]
        mixed = jnp.where(jnp.any(seen, axis=-1)[..., None], mixed, 0.0)
    return jnp.swapaxes(mixed, 1, 2).reshape(query.shape)


def block_size(causal: bool, window: int) -> int:
    """Queries of a block: as many as keys that one query sees beside itself, or few more where those are few."""
    return max(window if causal else 2 * window, LEAST_BLOCK)


def in_blocks_pays(length: int, causal: bool, window: int) -> bool:
    """Whether `attention_in_blocks` looks at so many fewer keys that its copies of them are worth it."""
    size = block_size(causal, window)
    return -(-length // size) * size * 2 * size <= BLOCKS_WORTH * length * length


def attention_in_blocks(
    plain: Callable[..., jax.Array],
    query: Float[Array, "B T ND"],
    key: Float[Array, "B T KD"],
    value: Float[Array, "B T KD"],
    mask: Bool[Array, "B T"],
    *,
    causal: bool,
    window: int,
) -> Float[Array, "B T ND"]:
    """`plain_attention` with a window, of blocks of queries, each with its own keys and those around it.

    Scores grow with the length and not with its square. A block of C queries sees 2 C keys, from `window` places before
    its first on: the halves of two neighbours, so that keys are copied once and moved no further.
    """
    batch, length = mask.shape
    size = block_size(causal, window)
    blocks = -(-length // size)

    def in_blocks(x: jax.Array, before: int, count: int) -> jax.Array:
        """[B, T, ...] as [B, count, C, ...], with so many places of zeros before it, and others behind."""
        padding = [(0, 0), (before, count * size - before - length), *[(0, 0)] * (x.ndim - 2)]
        return jnp.pad(x, padding).reshape(batch, count, size, *x.shape[2:])

    def around(x: jax.Array) -> jax.Array:
        """[B, T, ...] as [B * blocks, 2 C, ...]."""
        parts = in_blocks(x, window, blocks + 1)
        pairs = jnp.concatenate([parts[:, :-1], parts[:, 1:]], axis=2)
        return pairs.reshape(batch * blocks, 2 * size, *x.shape[2:])

    near = places(size, 2 * size, causal, window, before=window)
    queries = in_blocks(query, 0, blocks).reshape(batch * blocks, size, -1)
    mixed = plain(queries, around(key), around(value), around(mask), near=near, blind=True)
    return mixed.reshape(batch, blocks * size, -1)[:, :length]


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


def places(queries: int, keys: int, causal: bool, window: int | None, *, before: int = 0) -> Bool[Array, "T S"] | None:
    """Which key each query may see by its place alone; None if all. So many keys stand before the first query's own."""
    if not causal and window is None:
        return None
    own = jnp.arange(queries, dtype=jnp.int32) + before
    distance = jnp.arange(keys, dtype=jnp.int32)[None, :] - own[:, None]
    seen = distance <= 0 if causal else jnp.ones((queries, keys), bool)
    return seen if window is None else seen & (jnp.abs(distance) <= window)


def split_heads(x: Float[Array, "B T ND"], num_heads: int) -> Float[Array, "B N T H"]:
    """Heads out of the last axis, to the second."""
    batch, length, width = x.shape
    return jnp.swapaxes(x.reshape(batch, length, num_heads, width // num_heads), 1, 2)
