"""Attention in C++: each kind of row, of heads, and of places that are seen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from arrays import normal
from parity import HEAD

from jaxembed import cpu_kernels, cpu_library
from jaxembed.layers import FLOAT32
from jaxembed.plain_attention import places
from jaxembed.tokens import Rows

BFLOAT16 = jnp.dtype("bfloat16")

pytestmark = pytest.mark.usefixtures("library")


def rounded(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return x.astype(BFLOAT16).astype(np.float64)


ROWS = ([1], [8], [40, 1, 17], [0, 3, 0, 16, 0], [130, 2, 129], [15, 16, 17, 31, 32, 33], [700])


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, HEAD), (4, 1, HEAD), (1, 1, 128)])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention(lengths: list[int], heads: int, kv_heads: int, width: int, flat: bool, dtype: str) -> None:
    """As the formula, for rows in lines of their own and one behind another; finite everywhere."""
    check_attention(lengths, (heads, kv_heads, width), flat, dtype)


@pytest.mark.parametrize("lengths", [[1], [40, 1, 17], [130, 2, 129], [15, 16, 17, 31, 32, 33], [700]])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 0, 5, 16, 64, 200])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_to_some_places(lengths: list[int], causal: bool, window: int | None, dtype: str) -> None:
    """The same where a query sees no key behind it, or none that is far away."""
    check_attention(lengths, (2, 1, HEAD), True, dtype, causal=causal, window=window)


def check_attention(lengths: list[int], sizes: tuple[int, int, int], flat: bool, dtype: str, **hidden: Any) -> None:
    """Attention of rows, of which the last third may be no keys where a window hides what is far away.

    In bfloat16 the operands of many keys are rounded where the CPU multiplies that, nothing else is.
    """
    heads, kv_heads, width = sizes
    told, length = np.array(lengths, np.int32), max(lengths)
    keys = told - told // 3 if hidden.get("window") else told
    if flat:
        # Some room behind the last row.
        rows = Rows.in_line(jnp.asarray(told), jnp.asarray(told), tokens=int(told.sum()) + 5, length=length)
        shape = (1, int(told.sum()) + 5)
    else:
        rows, shape = Rows(jnp.arange(length)[None] < told[:, None]), (len(told), length)
    q, (k, v) = normal(*shape, heads * width), normal(2, *shape, kv_heads * width, seed=1)
    options = {"head_dim": width, "scale": width**-0.5, "dtype": jnp.dtype(dtype), **hidden}
    mixed = jax.jit(lambda *y: cpu_kernels.attention(*y, rows.starts, rows.lengths, jnp.asarray(keys), **options))
    got = np.asarray(mixed(q, k, v))
    assert np.isfinite(got).all()
    q, k, v, got = (x.reshape(-1, x.shape[-1] // width, width).astype(np.float64) for x in (q, k, v, got))
    for start, count, seen in zip(np.asarray(rows.starts), told, keys, strict=True):
        row, those = slice(start, start + count), slice(start, start + seen)
        near = places(int(count), int(seen), hidden.get("causal", False), hidden.get("window"))
        for head in range(heads):
            key, value = (x[those, head // (heads // kv_heads)] for x in (k, v))
            query, tolerance = q[row, head], 2e-6
            coarse = dtype == "bfloat16" and seen > 32 and cpu_library.in_pairs(width)
            if coarse:
                # A weight between two numbers may be either.
                query, key, value, tolerance = *map(rounded, (query, key, value)), 2e-3
            scores = np.where(True if near is None else near, query @ key.T * width**-0.5, -np.inf)
            weights = np.exp(scores - np.maximum(scores.max(axis=1, initial=-np.inf, keepdims=True), -1e30))
            sums = weights.sum(axis=1, keepdims=True)
            mean = (rounded(weights) if coarse else weights) @ value / np.where(sums > 0, sums, 1)
            np.testing.assert_allclose(got[row, head], mean, atol=tolerance)


def test_tokens_that_are_no_keys_have_outputs() -> None:
    """Those behind `seen` see the first ones, as ColBERT's masks do."""
    q, k, v = normal(3, 1, 20, HEAD)
    numbers = (jnp.array([0]), jnp.array([20]), jnp.array([5]))
    got = jax.jit(lambda *y: cpu_kernels.attention(*y, *numbers, head_dim=HEAD, scale=1.0, dtype=FLOAT32))(q, k, v)
    weights = np.exp(q[0].astype(np.float64) @ k[0, :5].T)
    np.testing.assert_allclose(got[0], weights @ v[0, :5] / weights.sum(axis=1, keepdims=True), atol=2e-6)


def test_scores_of_any_size() -> None:
    """Large ones overflow no exponential."""
    q, k, v = normal(3, 1, 40, HEAD)
    numbers = (jnp.array([0]), jnp.array([40]), jnp.array([40]))
    got = jax.jit(lambda *y: cpu_kernels.attention(*y, *numbers, head_dim=HEAD, scale=1e4, dtype=FLOAT32))(q, k, v)
    best = np.argmax(q[0] @ k[0].T, axis=1)
    np.testing.assert_allclose(got[0], v[0, best], atol=1e-3)
