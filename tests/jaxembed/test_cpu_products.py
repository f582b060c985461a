"""The products in C++: each size, the functions behind them, and threads beside each other."""

import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from scipy.special import erf

from jaxembed import cpu_kernels, cpu_library
from jaxembed.layers import activation

pytestmark = pytest.mark.usefixtures("library")


def check_products(size: tuple[int, int], act: str | None, dtype: str, counts: Sequence[int]) -> None:
    """Within what float32 does to sums of products of what is in that dtype; with a bias and without."""
    depth, width = size
    kernel = (normal(width, depth, seed=1000) / np.float32(depth**0.5)).astype(dtype)
    bias = normal(width)
    inputs = [normal(1, tokens, depth, seed=tokens, dtype=dtype) for tokens in counts]

    @jax.jit
    def call(inputs: list[jax.Array], *given: jax.Array) -> list[tuple[jax.Array, ...]]:
        return [cpu_kernels.products(x, [(given[0], given[1]), (given[0], None)], act) for x in inputs]

    for x, got in zip(inputs, call(inputs, kernel, bias), strict=True):
        plain = x.astype(np.float64) @ kernel.astype(np.float64).T
        for one, wanted in zip(got, (plain + bias, plain), strict=True):
            if act is not None:
                wanted = 0.5 * wanted * (1 + erf(wanted * 0.5**0.5))
            np.testing.assert_allclose(one, wanted, atol=1e-6 + 2.5e-7 * depth**0.5)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 48), (100, 50), (384, 96), (400, 131), (416, 48), (1536, 49)])
@pytest.mark.parametrize("act", [None, "gelu"])
def test_products(size: tuple[int, int], act: str | None) -> None:
    """Whole panels, tiles and blocks and parts of them."""
    check_products(size, act, "float32", (1, 7, 8, 9, 16, 17, 31, 33, 64, 100, 257))


@pytest.mark.parametrize(
    "size", [(1, 1), (5, 3), (32, 1), (64, 50), (100, 50), (384, 96), (416, 48), (768, 131), (1536, 49)]
)
@pytest.mark.parametrize("act", [None, "gelu"])
def test_products_in_bfloat16(size: tuple[int, int], act: str | None) -> None:
    """The same, in pairs or not; more tokens than one group, more features than one pass."""
    check_products(size, act, "bfloat16", (1, 7, 16, 17, 31, 33, 64, 100, 1500))


def test_what_is_multiplied_in_pairs() -> None:
    """Features in steps of 32, where the CPU multiplies bfloat16."""
    assert not any(cpu_library.in_pairs(depth) for depth in (1, 33, 400))
    assert cpu_library.in_pairs(384) == (" avx512_bf16 " in f"{cpu_library.host_cpu()} ")


def check_linear_norm(size: tuple[int, int], dtype: str) -> None:
    """A product's sum with the residual, as the formula of LayerNorm; with biases and without."""
    depth, width = size
    kernel = (normal(width, depth, seed=1000) / np.float32(depth**0.5)).astype(dtype)
    bias, scale, shift = normal(3, width, seed=1)
    inputs = [
        (normal(1, tokens, depth, seed=tokens, dtype=dtype), normal(1, tokens, width))
        for tokens in (1, 9, 16, 33, 100, 257)
    ]

    @jax.jit
    def call(inputs: list[tuple[jax.Array, jax.Array]], *given: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        kernel, bias, scale, shift = given
        return [
            (
                cpu_kernels.linear_norm(x, (kernel, bias), residual, (scale, shift, 1e-3)),
                cpu_kernels.linear_norm(x, (kernel, None), residual, (scale, None, 1e-3)),
            )
            for x, residual in inputs
        ]

    for (x, residual), got in zip(inputs, call(inputs, kernel, bias, scale, shift), strict=True):
        plain = residual + x.astype(np.float64) @ kernel.astype(np.float64).T
        for one, total, added in zip(got, (plain + bias, plain), (shift, 0.0), strict=True):
            centred = total - total.mean(axis=-1, keepdims=True)
            wanted = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-3) * scale + added
            # A product's error is scaled too; of few features the variance may be near 0, and the sum divided by that.
            atol = (1e-6 + 2.5e-7 * depth**0.5) * np.abs(scale).max()
            np.testing.assert_allclose(one, wanted, atol=atol, rtol=5e-5 if width < 8 else 0)


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (100, 50), (384, 384), (96, 131), (40, 1000)])
def test_linear_norm(size: tuple[int, int]) -> None:
    """Widths that are whole vectors and such that are not."""
    check_linear_norm(size, "float32")


@pytest.mark.parametrize("size", [(5, 3), (32, 3), (64, 50), (384, 384)])
def test_linear_norm_in_bfloat16(size: tuple[int, int]) -> None:
    check_linear_norm(size, "bfloat16")


def check_feed_forward(inner: int, width: int, act: str | None, dtype: str, atol: float = 0.0) -> None:
    """What a product and a `linear_norm` give, to the last bit if nothing else is said."""
    first, second = normal(inner, width, seed=1) / np.float32(width**0.5), normal(width, inner, seed=2)
    kernels = (first.astype(dtype), second.astype(dtype))
    inputs = [normal(1, tokens, width, seed=tokens) for tokens in (1, 9, 16, 33, 100, 257)]

    @jax.jit
    def call(inputs: list[jax.Array], up: jax.Array, down: jax.Array, *given: jax.Array) -> list[list[jax.Array]]:
        results = []
        for x in inputs:
            for bias, last, shift in (given[:3], (None, None, None)):
                norm = (given[3], shift, 1e-5)
                (between,) = cpu_kernels.products(x, [(up, bias)], act)
                wanted = cpu_kernels.linear_norm(between, (down, last), x, norm)
                results.append([cpu_kernels.feed_forward(x, (up, bias), (down, last), act, norm), wanted])
        return results

    for got, wanted in call(inputs, *kernels, normal(inner), *normal(3, width)):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(("inner", "width"), [(1, 1), (3, 5), (100, 50), (1536, 384)])
@pytest.mark.parametrize("act", [None, "gelu"])
def test_feed_forward(inner: int, width: int, act: str | None) -> None:
    check_feed_forward(inner, width, act, "float32")


@pytest.mark.parametrize(("inner", "width"), [(3, 5), (32, 32), (100, 50), (96, 64), (1536, 384)])
def test_feed_forward_in_bfloat16(inner: int, width: int) -> None:
    """What an activation gives is rounded, and now and then the other way than a product's own."""
    check_feed_forward(inner, width, "relu", "bfloat16")
    check_feed_forward(inner, width, "gelu", "bfloat16", atol=2.0**-6 if cpu_library.in_pairs(inner) else 0.0)


@pytest.mark.parametrize("act", [act for act in cpu_kernels.ACTIVATIONS if act is not None])
def test_activations_that_are_rounded(act: str) -> None:
    """As the formula's results rounded to bfloat16, all but a few, and those by a step."""
    x = normal(200, 64, dtype="bfloat16") * 4
    identity, norm = (jnp.eye(64, dtype="bfloat16"), None), (jnp.ones(64), None, 1e-5)
    got = jax.jit(lambda x: cpu_kernels.feed_forward(x, identity, identity, act, norm))(x[None])[0]
    between = np.asarray(activation(act)(jnp.asarray(x)))
    if cpu_library.in_pairs(64):
        between = between.astype("bfloat16").astype(np.float32)
    total = x.astype(np.float64) + between
    total -= total.mean(axis=1, keepdims=True)
    wanted = total / np.sqrt((total**2).mean(axis=1, keepdims=True) + 1e-5)
    differences = np.abs(got - wanted)
    assert differences.max() <= 2.0**-7
    assert np.mean(differences.max(axis=1) > 1e-5) <= 0.2


def check_gated_feed_forward(inner: int, width: int, act: str | None, dtype: str) -> None:
    """To the last bit what three products give."""
    first = normal(2, inner, width, seed=1, dtype=dtype) / np.float32(2 ** round(np.log2(width) / 2))
    second = normal(width, inner, seed=2) / np.float32(inner**0.5)
    kernels = (*first.astype(dtype), second.astype(dtype))
    inputs = [normal(1, tokens, width, seed=tokens) for tokens in (1, 9, 16, 33, 100, 257)]

    @jax.jit
    def call(inputs: list[jax.Array], *given: jax.Array) -> list[list[jax.Array]]:
        gate, up, down, *biases = given
        results = []
        for x in inputs:
            for gate_bias, up_bias, last in (biases, (None, None, None)):
                (gates,) = cpu_kernels.products(x, [(gate, gate_bias)], act)
                (between,) = cpu_kernels.products(x, [(up, up_bias)])
                (wanted,) = cpu_kernels.products(between * gates, [(down, last)])
                matrices = ((gate, gate_bias), (up, up_bias), (down, last))
                results.append([cpu_kernels.gated_feed_forward(x, *matrices, act), wanted])
        return results

    for got, wanted in call(inputs, *kernels, *normal(2, inner), normal(width)):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("inner", "width"), [(1, 1), (3, 5), (100, 50), (1152, 384)])
@pytest.mark.parametrize("act", [None, "gelu", "silu"])
def test_gated_feed_forward(inner: int, width: int, act: str | None) -> None:
    check_gated_feed_forward(inner, width, act, "float32")


@pytest.mark.parametrize(("inner", "width"), [(3, 5), (32, 32), (100, 50), (96, 64), (1152, 384)])
def test_gated_feed_forward_in_bfloat16(inner: int, width: int) -> None:
    check_gated_feed_forward(inner, width, "gelu", "bfloat16")


@pytest.mark.parametrize("act", [act for act in cpu_kernels.ACTIVATIONS if act is not None])
def test_activations_far_from_zero(act: str) -> None:
    """As XLA's, to rounding, for numbers of every size; and NaN stays NaN."""
    x = np.concatenate([np.linspace(-30, 30, 4001), [-1e30, 1e30, -1e-30, 0.0, np.nan]]).astype(np.float32)[
        None, :, None
    ]
    (got,) = jax.jit(lambda x: cpu_kernels.products(x, [(jnp.ones((1, 1)), None)], act))(x)
    wanted = np.asarray(activation(act)(jnp.asarray(x)))
    np.testing.assert_allclose(got, wanted, rtol=3e-7, atol=8e-7)


def test_many_callers_at_a_time() -> None:
    """More calls than cores, of sizes that are shared out and of such that are not: each gets its own numbers."""
    sizes = (16, 64, 300)
    kernel = normal(768, 384)
    calls = [jax.jit(lambda x: cpu_kernels.products(x, [(jnp.asarray(kernel), None)])[0]) for _ in sizes]
    inputs = [normal(1, tokens, 384, seed=tokens) for tokens in sizes]
    wanted = [np.asarray(call(x)) for call, x in zip(calls, inputs, strict=True)]
    wrong: list[int] = []

    def repeat(which: int) -> None:
        for _ in range(60):
            if not np.array_equal(calls[which](inputs[which]), wanted[which]):
                wrong.append(which)

    threads = [threading.Thread(target=repeat, args=(i % len(sizes),)) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
