"""Attention by products that XLA compiles, whole rows or blocks of them. Letters in shapes are those of `layers`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxembed.layers import FLOAT32, MASKED, matmul

__all__ = ["attention_in_blocks", "in_blocks_pays", "places", "plain_attention", "split_heads"]

LEAST_BLOCK = 64
"""Queries that a block has at least: products of fewer are slow."""

BLOCKS_WORTH = 0.75
"""Which share of all keys blocks may look at, to be used."""


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
    chosen = partial(scores_chosen, dtype=dtype)
    scores: jax.Array = jax.lax.platform_dependent(q, k, mask, cpu=scores_added, default=chosen)
    return scores


def scores_chosen(
    q: Float[Array, "B N T H"], k: Float[Array, "B N S H"], mask: Bool[Array, "B S"], *, dtype: jnp.dtype
) -> Float[Array, "B N T S"]:
    """`masked_scores` by a pass over all scores."""
    return jnp.where(mask[:, None, None, :], matmul("BNTH,BNSH->BNTS", q, k, dtype), MASKED)


def scores_added(
    q: Float[Array, "B N T H"], k: Float[Array, "B N S H"], mask: Bool[Array, "B S"]
) -> Float[Array, "B N T S"]:
    """`masked_scores` by one more feature."""
    hidden = jnp.broadcast_to(jnp.where(mask, 0.0, MASKED)[:, None, :, None], (*k.shape[:3], 1))
    ones = jnp.ones((*q.shape[:3], 1), q.dtype)
    keys = jnp.concatenate([k, hidden], axis=-1)
    return matmul("BNTH,BNSH->BNTS", jnp.concatenate([q, ones], axis=-1), keys, FLOAT32)


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
