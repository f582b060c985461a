"""What a model is made of, in C++, for one CPU, called by XLA's executables.

XLA's matrix product on CPU repacks one of its operands at every call, which few tokens do not repay, its attention
over short rows is many small steps, and whatever it computes it computes for all tokens that there is room for. Letters
in shapes are those of `layers` and `tokens`.

Each can be told how many tokens there are, of all lines together: what stands behind them is not looked at, and in the
result anything may stand there.

All raise RuntimeError where the library (`cpu_library`) is not loaded.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from jaxembed import cpu_library
from jaxembed.cpu_library import Target

__all__ = [
    "ACTIVATIONS",
    "LookUp",
    "Norm",
    "Product",
    "attention",
    "embed",
    "feed_forward",
    "gated_feed_forward",
    "linear_norm",
    "products",
    "totals",
]

ACTIVATIONS: Mapping[str | None, int] = {
    None: 0,
    "gelu": 1,
    "gelu_new": 2,
    "gelu_pytorch_tanh": 2,
    "silu": 3,
    "swish": 3,
    "relu": 4,
}
"""Functions that a product can end with, by Hugging Face's names, and their numbers in the source."""

Product = tuple[Float[Array, "N K"], Float[Array, " N"] | None]
"""A kernel and its bias."""

EVERYTHING = np.iinfo(np.int32).max
"""A window that hides nothing."""

Count = Int[Array, ""] | None
"""How many tokens there are, the first ones; None: all."""

LookUp = tuple[Float[Array, "_ N"], Int[Array, "_ _"]]
"""A table of vectors, and which of them each token has; one for all where an axis has the size 1."""

Norm = tuple[Float[Array, " N"], Float[Array, " N"] | None, float]
"""Scale and bias of a LayerNorm, and what it adds to the variance."""


def embed(lookups: Sequence[LookUp], norm: Norm, *, tokens: Count = None) -> Float[Array, "L M N"]:
    """norm(the sum of what each table has for a token).

    Args:
        lookups: tables, all in one of `cpu_library.DTYPES`, and ids, those of the first one [L, M]; beyond either end
            the first or the last is read.
        norm: of the sum.
    """
    table, ids = lookups[0]
    spread = [(one, jnp.broadcast_to(which.astype(jnp.int32), ids.shape)) for one, which in lookups]
    call = jax.ffi.ffi_call(Target.EMBED, written((*ids.shape, table.shape[1])))
    operands = (*(array for one in spread for array in one), *with_bias(norm[:2]), counted(ids, tokens))
    embedded: jax.Array = call(*operands, eps=np.float32(norm[2]))
    return embedded


def products(
    x: Float[Array, "L M K"],
    matrices: Sequence[tuple[Float[Array, "_ K"], Float[Array, " _"] | None]],
    activation: str | None = None,
    *,
    tokens: Count = None,
) -> tuple[Float[Array, "L M _"], ...]:
    """activation(x @ kernel^T + bias) of each matrix, float32; x is rounded to bfloat16 where `in_pairs`.

    Args:
        x: float32.
        matrices: kernels, [output, input], all in one of `cpu_library.DTYPES`, and their biases.
        activation: one of `ACTIVATIONS`.
    """
    shapes = [(*x.shape[:-1], kernel.shape[0]) for kernel, _ in matrices]
    call = jax.ffi.ffi_call(Target.LINEAR, [*map(written, shapes), room(x, x.shape[-1])])
    operands = (x, counted(x, tokens), *(array for one in matrices for array in with_bias(one)))
    results: Sequence[jax.Array] = call(*operands, activation=np.int32(ACTIVATIONS[activation]))
    return tuple(results[:-1])


def linear_norm(
    x: Float[Array, "L M K"], matrix: Product, residual: Float[Array, "L M N"], norm: Norm, *, tokens: Count = None
) -> Float[Array, "L M N"]:
    """norm(residual + x @ kernel^T + bias), as one of `products` and a LayerNorm.

    Args:
        x, residual: float32.
        matrix: kernel, [output, input], in one of `cpu_library.DTYPES`, and bias.
        norm: of the sum.
    """
    call = jax.ffi.ffi_call(Target.LINEAR_NORM, [written(residual.shape), room(x, x.shape[-1])])
    operands = (x, counted(x, tokens), *with_bias(matrix), residual, *with_bias(norm[:2]))
    results: Sequence[jax.Array] = call(*operands, eps=np.float32(norm[2]))
    return results[0]


def feed_forward(
    x: Float[Array, "L M N"],
    up: tuple[Float[Array, "F N"], Float[Array, " F"] | None],
    down: tuple[Float[Array, "N F"], Float[Array, " N"] | None],
    activation: str | None,
    norm: Norm,
    *,
    tokens: Count = None,
) -> Float[Array, "L M N"]:
    """norm(x + activation(x @ up^T + its bias) @ down^T + its bias), without what is between.

    Args:
        x: float32.
        up, down: kernels, [output, input], both in one of `cpu_library.DTYPES`, and their biases.
        activation: one of `ACTIVATIONS`.
        norm: of the sum.
    """
    call = jax.ffi.ffi_call(Target.FEED_FORWARD, [written(x.shape), room(x, sum(down[0].shape))])
    operands = (x, counted(x, tokens), *with_bias(up), *with_bias(down), *with_bias(norm[:2]))
    options = {"activation": np.int32(ACTIVATIONS[activation]), "eps": np.float32(norm[2])}
    results: Sequence[jax.Array] = call(*operands, **options)
    return results[0]


def gated_feed_forward(
    x: Float[Array, "L M N"],
    gate: tuple[Float[Array, "F N"], Float[Array, " F"] | None],
    up: tuple[Float[Array, "F N"], Float[Array, " F"] | None],
    down: tuple[Float[Array, "N F"], Float[Array, " N"] | None],
    activation: str | None,
    *,
    tokens: Count = None,
) -> Float[Array, "L M N"]:
    """(activation(x @ gate^T + its bias) * (x @ up^T + its bias)) @ down^T + its bias, without what is between.

    Args:
        x: float32.
        gate, up, down: kernels, [output, input], all in one of `cpu_library.DTYPES`, and their biases.
        activation: one of `ACTIVATIONS`.
    """
    width, inner = down[0].shape
    call = jax.ffi.ffi_call(Target.GATED_FEED_FORWARD, [written(x.shape), room(x, width + 2 * inner)])
    operands = (x, counted(x, tokens), *with_bias(gate), *with_bias(up), *with_bias(down))
    results: Sequence[jax.Array] = call(*operands, activation=np.int32(ACTIVATIONS[activation]))
    return results[0]


def written(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """An array that is given back."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def with_bias(one: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
    """Kernel or scale, and bias; one that is not there has no numbers."""
    first, bias = one
    return first, jnp.zeros(0, jnp.float32) if bias is None else bias


def counted(x: Shaped[Array, "L M *rest"], tokens: Count) -> Int[Array, " 1"]:
    """How many tokens there are, as the calls are told."""
    return jnp.full(1, x.shape[0] * x.shape[1], jnp.int32) if tokens is None else tokens.astype(jnp.int32).reshape(1)


def room(x: Float[Array, "L M K"], depth: int) -> jax.ShapeDtypeStruct:
    """For so many features of each token, as a kernel lays them."""
    return written((cpu_library.room(x.shape[0] * x.shape[1], depth),))


def attention(
    query: Float[Array, "L M ND"],
    key: Float[Array, "L M KD"],
    value: Float[Array, "L M KD"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    seen: Int[Array, " B"],
    *,
    head_dim: int,
    scale: float,
    dtype: jnp.dtype,
    causal: bool = False,
    window: int | None = None,
    tokens: Count = None,
) -> Float[Array, "L M ND"]:
    """softmax(Q K^T * scale) V of rows in lines; zeros where there is no row, or a query sees no key.

    Args:
        query, key, value: heads side by side in the last axis, float32.
        starts: the first token of each row, counted over all lines; ascending.
        counts: tokens of each row.
        seen: how many of them, the first ones, are keys.
        head_dim: H, a multiple of twice `cpu_library.lanes()`.
        scale: of the scores.
        dtype: "bfloat16" lets operands of the products be rounded to that, as they are for many keys where the CPU
            multiplies that.
        causal, window: as of `attention.attention`.
    """
    call = jax.ffi.ffi_call(Target.ATTENTION, written(query.shape))
    radius = EVERYTHING if window is None else min(window, EVERYTHING)
    mixed: jax.Array = call(
        *(query, key, value, starts, counts, seen, counted(query, tokens)),
        before=np.int32(radius),
        behind=np.int32(0 if causal else radius),
        half=np.int32(dtype == jnp.bfloat16),
        head_dim=np.int32(head_dim),
        scale=np.float32(scale),
    )
    return mixed


def totals(
    x: Float[Array, "L M N"],
    weights: Float[Array, "B T"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    *,
    tokens: Count = None,
) -> Float[Array, "B N"]:
    """The sum of each row's tokens, each times its weight; zeros where there is no row.

    Args:
        x: float32.
        weights: of the places of each row; behind its last token they are not looked at.
        starts, counts: as of `attention`.
    """
    call = jax.ffi.ffi_call(Target.TOTALS, written((weights.shape[0], x.shape[-1])))
    summed: jax.Array = call(x, weights, starts, counts, counted(x, tokens))
    return summed
