"""Token vectors -> one vector a text: pooling, matryoshka slice, L2 norm. float32, inside the executable.

The formulas are sentence-transformers 6.2's (Pooling, Normalize); matryoshka follows OpenAI's API: the vector is
cut first and normalised after.
"""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxembed.tokens import Rows
from jaxembed.types import Pooling, PoolingMode, SpladePooling

__all__ = ["finish", "pool", "splade", "unit"]

Lines = Float[Array, "L M D"]
Mask = Bool[Array, "B T"]

EPS_COUNT = 1e-9
EPS_NORM = 1e-12


def first_token(x: Lines, rows: Rows, mask: Mask, weights: Float[Array, "B T"]) -> Float[Array, "B D"]:
    """The first token that counts; position 0 where none does."""
    return rows.one(x, jnp.argmax(mask, axis=1))


def last_token(x: Lines, rows: Rows, mask: Mask, weights: Float[Array, "B T"]) -> Float[Array, "B D"]:
    """The last token that counts; zeros where none does."""
    index = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.where(mask.any(axis=1, keepdims=True), rows.one(x, index), 0.0)


def largest(x: Lines, rows: Rows, mask: Mask, weights: Float[Array, "B T"]) -> Float[Array, "B D"]:
    """Per feature the largest value over the tokens that count."""
    return jnp.max(jnp.where(mask[:, :, None], rows.apart(x), -jnp.inf), axis=1)


def mean(x: Lines, rows: Rows, mask: Mask, weights: Float[Array, "B T"]) -> Float[Array, "B D"]:
    """sum / max(count, 1e-9)."""
    return rows.total(x, mask.astype(x.dtype)) / count(mask)


def mean_sqrt_length(x: Lines, rows: Rows, mask: Mask, weights: Float[Array, "B T"]) -> Float[Array, "B D"]:
    """sum / sqrt(max(count, 1e-9))."""
    return rows.total(x, mask.astype(x.dtype)) / jnp.sqrt(count(mask))


def weighted_mean(x: Lines, rows: Rows, mask: Mask, weights: Float[Array, "B T"]) -> Float[Array, "B D"]:
    """Mean with weights 1, 2, 3, ... counted from the first token that is not padding (https://arxiv.org/abs/2202.08904)."""
    kept = weights * mask.astype(x.dtype)
    return rows.total(x, kept) / jnp.maximum(jnp.sum(kept, axis=1, keepdims=True), EPS_COUNT)


def count(mask: Mask) -> Float[Array, "B 1"]:
    """How many tokens count, at least 1e-9."""
    return jnp.maximum(jnp.sum(mask, axis=1, keepdims=True).astype(jnp.float32), EPS_COUNT)


MODES: Mapping[PoolingMode, Callable[[Lines, Rows, Mask, Float[Array, "B T"]], Float[Array, "B D"]]] = {
    PoolingMode.CLS: first_token,
    PoolingMode.MAX: largest,
    PoolingMode.MEAN: mean,
    PoolingMode.MEAN_SQRT_LEN: mean_sqrt_length,
    PoolingMode.WEIGHTED_MEAN: weighted_mean,
    PoolingMode.LAST_TOKEN: last_token,
}


def pool(x: Lines, rows: Rows, prompt_lengths: Int[Array, " B"], pooling: Pooling) -> Float[Array, "B P"]:
    """Pool token vectors; several modes are concatenated, so P = D * len(pooling.modes).

    Args:
        x: token vectors, float32, in lines: only their largest values need them by rows.
        rows: where the rows stand; where each has a line of its own, with padding on either side.
        prompt_lengths: leading tokens to leave out; used only if `pooling.include_prompt` is false.
        pooling: the model's Pooling module.
    """
    mask = rows.mask
    positions = (
        jnp.arange(mask.shape[1], dtype=jnp.int32)[None, :] - jnp.argmax(mask, axis=1).astype(jnp.int32)[:, None]
    )
    kept = mask if pooling.include_prompt else mask & (positions >= prompt_lengths[:, None])
    weights = (positions + 1).astype(x.dtype)
    return jnp.concatenate([MODES[mode](x, rows, kept, weights) for mode in pooling.modes], axis=-1)


def splade(logits: Float[Array, "B T V"], mask: Mask, pooling: SpladePooling) -> Float[Array, "B V"]:
    """Logits over the vocabulary for each token -> one weight for each entry; see `types.SpladePooling`.

    Args:
        logits: of the masked-language-model head.
        mask: tokens that are not padding.
        pooling: the model's SpladePooling module.
    """
    weights = jnp.where(mask[:, :, None], jnp.maximum(logits, 0.0), 0.0)
    # The logarithm grows with its argument: that of the largest is the largest, and only one an entry is reckoned.
    weights = jnp.max(weights, axis=1, keepdims=True) if pooling.strategy == "max" else weights
    weights = jnp.log1p(weights)
    return jnp.sum(jnp.log1p(weights) if pooling.twice else weights, axis=1)


def finish(
    vectors: Float[Array, "B *shape P"], dimensions: Int[Array, " B"], normalize: Bool[Array, " B"]
) -> Float[Array, "B *shape P"]:
    """Cut each row's vectors to its matryoshka size, then L2-normalise those of the rows that ask for it.

    Args:
        vectors: one vector a row, or several.
        dimensions: features to keep per row; the rest becomes 0.
        normalize: divide by max(norm, 1e-12)?

    Returns:
        The same shape: the caller slices row i to dimensions[i].
    """
    rows = (-1,) + (1,) * (vectors.ndim - 1)
    places = jnp.arange(vectors.shape[-1], dtype=jnp.int32).reshape((1,) * (vectors.ndim - 1) + (-1,))
    cut = jnp.where(places < dimensions.reshape(rows), vectors, 0.0)
    return jnp.where(normalize.reshape(rows), unit(cut), cut)


def unit(x: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
    """x / max(L2 norm, 1e-12) over the last axis."""
    # The maximum stands inside the root, so that the gradient of a zero vector is 0 and not NaN.
    return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), EPS_NORM**2))
