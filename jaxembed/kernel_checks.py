"""Whether `cpu_kernels` give what their formulas say on this machine: each is tried before it is used."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxembed import cpu_kernels, cpu_library
from jaxembed.layers import activation, layer_norm
from jaxembed.plain_attention import places

__all__ = ["right"]

logger = logging.getLogger(__name__)

ALLOWED = 1e-5
"""The largest absolute error of results that are around 1."""

ROUNDED = 2.0**-4
"""The same where numbers between are rounded, some of them the other way: a few steps of bfloat16 for one around 4."""

WIDTH = 96
"""Features of a layer that is tried."""

MANY = 200
"""Its tokens: so many are multiplied in every way that there is (`cpp/linear.h`)."""

Numbers = npt.NDArray[Any]


def right(dtype: str) -> bool:
    """Whether they give what their formulas say; the log says so if not."""
    exact = (wrong_in_products, wrong_in_norms, wrong_in_gated, wrong_in_attention, wrong_in_rows)
    rounded = dtype == "bfloat16" and cpu_library.in_pairs(WIDTH)
    for allowed, tried in ((ALLOWED, exact), (ROUNDED if rounded else ALLOWED, (wrong_in_activations,))):
        # NaN is no less than anything.
        worst = float(np.max([error for wrong in tried for error in wrong(dtype)]))
        if not worst <= allowed:
            logger.warning("the kernels for CPU are off by %.1e, more than %.1e, and are not used", worst, allowed)
            return False
    return True


def wrong_in_products(dtype: str) -> list[float]:
    """The largest error of each of some `products`; of one of them with each activation."""
    errors: list[float] = []
    every = {number: act for act, number in cpu_kernels.ACTIVATIONS.items() if act is not None}
    for tokens, depth, width, acts in (
        (1, 32, 50, ["gelu"]),
        (29, 224, 150, list(every.values())),
        (MANY, 768, 96, ["gelu"]),
    ):
        x, kernel, bias = product(dtype, tokens, depth, width)
        plain = jnp.asarray(x.astype(np.float64) @ kernel.T.astype(np.float64) + bias, jnp.float32)

        def off(x: jax.Array, plain: jax.Array, *matrix: jax.Array, acts: list[str] = acts) -> list[jax.Array]:
            got = [cpu_kernels.products(x[None], [(matrix[0], matrix[1])], act)[0][0] for act in acts]
            return [y - activation(act)(plain) for y, act in zip(got, acts, strict=True)]

        # The maximum by NumPy: XLA's on a CPU may miss that all of it is NaN.
        errors += [float(np.abs(np.asarray(y)).max()) for y in jax.jit(off)(x, plain, kernel, bias)]
    return errors


def wrong_in_gated(dtype: str) -> list[float]:
    """The same of a `gated_feed_forward`, beside the two products and the third."""
    x, up, bias = product(dtype, MANY, 96, 96)
    identity, ones = (jnp.eye(96, dtype=dtype), None), jnp.ones(96)

    def both(x: jax.Array, up: cpu_kernels.Product) -> tuple[jax.Array, jax.Array]:
        gates, inner = cpu_kernels.products(x, [up], "silu")[0], cpu_kernels.products(x, [(up[0], ones)])[0]
        gated = cpu_kernels.gated_feed_forward(x, up, (up[0], ones), identity, "silu")
        return cpu_kernels.products(gates * inner, [identity])[0], gated

    wanted, got = map(np.asarray, jax.jit(both)(x[None], (up, bias)))
    return [apart(got, wanted)]


def wrong_in_norms(dtype: str) -> list[float]:
    """The same of a `linear_norm`, and of a `feed_forward` beside a product and that."""
    x, _, _, identity, (scale, shift, eps) = layer(dtype)
    got = jax.jit(lambda x: cpu_kernels.linear_norm(x, identity, x, (scale, shift, eps)))(x)
    wanted = layer_norm(2 * x, scale, shift, eps)
    return [apart(np.asarray(got), np.asarray(wanted)), wrong_in_feed_forward(dtype, "relu")]


def wrong_in_activations(dtype: str) -> list[float]:
    """The same of a `feed_forward` with each activation: they may be others where their results are rounded."""
    acts = {number: act for act, number in cpu_kernels.ACTIVATIONS.items()}
    return [wrong_in_feed_forward(dtype, act) for act in acts.values()]


def wrong_in_feed_forward(dtype: str, act: str | None) -> float:
    """The largest difference of a `feed_forward` from a product and a `linear_norm`."""
    x, kernel, bias, identity, norm = layer(dtype)

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        (inner,) = cpu_kernels.products(x, [(kernel, bias)], act)
        plain = cpu_kernels.linear_norm(inner, identity, x, norm)
        return cpu_kernels.feed_forward(x, (kernel, bias), identity, act, norm), plain

    return apart(*map(np.asarray, jax.jit(both)(x)))


def layer(dtype: str) -> tuple[jax.Array, jax.Array, jax.Array, cpu_kernels.Product, cpu_kernels.Norm]:
    """x, kernel and bias of a product, another that changes nothing but may round, and a norm."""
    x, kernel, bias = map(jnp.asarray, product(dtype, MANY, WIDTH, WIDTH))
    scale, shift = map(jnp.asarray, product("float32", 2, WIDTH, 1)[0])
    return x[None], kernel, bias, (jnp.eye(WIDTH, dtype=dtype), None), (scale, shift, 1e-5)


def wrong_in_attention(dtype: str) -> list[float]:
    """The same of each row of an `attention`, to all places and to some."""
    head = 2 * cpu_library.lanes()
    counts = np.array([1, 40, 17], np.int32)
    starts = np.array([0, 1, 41], np.int32)
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 60, head)).astype(np.float32)
    scale = head**-0.5
    if dtype == "bfloat16":
        # Scores are whole numbers and weights are powers of two, which rounding leaves as they are.
        q, k, v, scale = np.sign(q), np.sign(k), v.astype(dtype).astype(np.float32), float(np.log(2.0))
    kinds: list[tuple[bool, int | None]] = [(False, None), (True, None), (False, 5)]

    def attention(*given: jax.Array) -> list[jax.Array]:
        options: dict[str, Any] = {"head_dim": head, "scale": scale, "dtype": jnp.dtype(dtype)}
        return [cpu_kernels.attention(*given, causal=causal, window=window, **options) for causal, window in kinds]

    errors = []
    for (causal, window), mixed in zip(kinds, jax.jit(attention)(q, k, v, starts, counts, counts), strict=True):
        for start, count in zip(starts, counts, strict=True):
            row = slice(start, start + count)
            near = places(int(count), int(count), causal, window)
            weights = np.exp(q[0, row].astype(np.float64) @ k[0, row].T * scale) * (
                1.0 if near is None else np.asarray(near)
            )
            wanted = weights @ v[0, row] / weights.sum(axis=1, keepdims=True)
            errors.append(apart(np.asarray(mixed)[0, row], wanted))
    return errors


def wrong_in_rows(dtype: str) -> list[float]:
    """The same of an `embed` and of `totals`."""
    random = np.random.default_rng(0)
    width, rows, eps = 100, 3, 1e-5
    scale, shift = random.normal(size=(2, width)).astype(np.float32)
    tables = random.normal(size=(2, 9, width)).astype(dtype)
    ids = random.integers(0, 9, (2, rows, 11), np.int32)

    def embed(tables: jax.Array, ids: jax.Array) -> jax.Array:
        norm = (jnp.asarray(scale), jnp.asarray(shift), eps)
        return cpu_kernels.embed(list(zip(tables, ids, strict=True)), norm)

    x = sum(table.astype(np.float32)[which] for table, which in zip(tables, ids, strict=True))
    embedded = np.asarray(layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(shift), eps))
    weights = random.normal(size=ids.shape[1:]).astype(np.float32)
    starts, counts = np.arange(rows, dtype=np.int32) * ids.shape[-1], np.full(rows, ids.shape[-1], np.int32)
    totals = np.einsum("BT,BTD->BD", weights, x)
    got = (jax.jit(embed)(tables, ids), jax.jit(cpu_kernels.totals)(x, weights, starts, counts))
    return [apart(np.asarray(y), z) for y, z in zip(got, (embedded, totals), strict=True)]


def apart(got: Numbers, wanted: Numbers) -> float:
    """The largest difference."""
    return float(np.abs(got - wanted).max())


def product(dtype: str, tokens: int, depth: int, width: int) -> tuple[Numbers, Numbers, Numbers]:
    """x, kernel and bias of a product, of which what the kernels round is rounded, with results around 1."""
    random = np.random.default_rng(0)
    sizes = ((tokens, depth), (width, depth), (width,))
    x, kernel, bias = (random.normal(size=size).astype(np.float32) for size in sizes)
    x, kernel = (y.astype(dtype) for y in (x, kernel / np.float32(depth**0.5)))
    return x.astype(np.float32), kernel, bias
