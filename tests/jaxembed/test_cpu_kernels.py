"""The kernels in C++: each size, each kind of row, threads beside each other, and whole models beside torch."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from parity import TINY, check_parity, randomise, tiny_bert
from scipy.special import erf
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen3Config,
    Qwen3Model,
)

from jaxembed import Bucket, Embedder, Ladder, cpu_kernels, cpu_library, kernel_choice, make_mesh
from jaxembed.kernel_choice import kernels_on
from jaxembed.kernels import Kernels, right_padded
from jaxembed.layers import FLOAT32, LayerNorm, Linear, activation, feed_forward, linears
from jaxembed.plain_attention import places
from jaxembed.tokens import Rows

Record = Callable[[str, object], None]
Floats = npt.NDArray[np.float32]

BFLOAT16 = jnp.dtype("bfloat16")

OF_BERT = set(cpu_library.Target) - {cpu_library.Target.GATED_FEED_FORWARD}
"""What BERT's layers call."""

HEAD = 32
"""Features of a head that every CPU's kernel takes."""

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def kernels() -> Iterator[None]:
    """What is traced in here may use them for any number of tokens."""
    with right_padded(Kernels(make_mesh(jax.devices()[:1]), cpu_tokens=1_000_000)):
        yield


def normal(*shape: int, seed: int = 0, dtype: str = "float32") -> Floats:
    """Random numbers, of those that there are in a dtype."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype).astype(np.float32)


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


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (8, 48), (100, 50), (384, 96), (400, 131), (1536, 49)])
@pytest.mark.parametrize("act", [None, "gelu"])
def test_products(size: tuple[int, int], act: str | None) -> None:
    """Whole panels, tiles and blocks and parts of them."""
    check_products(size, act, "float32", (1, 7, 8, 9, 16, 17, 31, 33, 64, 100, 257))


@pytest.mark.parametrize("size", [(1, 1), (5, 3), (32, 1), (64, 50), (100, 50), (384, 96), (768, 131), (1536, 49)])
@pytest.mark.parametrize("act", [None, "gelu"])
def test_products_in_bfloat16(size: tuple[int, int], act: str | None) -> None:
    """The same, in pairs or not; more tokens than one group too."""
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


def check_feed_forward(inner: int, width: int, act: str | None, dtype: str) -> None:
    """To the last bit what a product and a `linear_norm` give."""
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
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("inner", "width"), [(1, 1), (3, 5), (100, 50), (1536, 384)])
@pytest.mark.parametrize("act", [None, "gelu"])
def test_feed_forward(inner: int, width: int, act: str | None) -> None:
    check_feed_forward(inner, width, act, "float32")


@pytest.mark.parametrize(("inner", "width"), [(3, 5), (32, 32), (100, 50), (96, 64), (1536, 384)])
def test_feed_forward_in_bfloat16(inner: int, width: int) -> None:
    check_feed_forward(inner, width, "gelu", "bfloat16")


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


@pytest.mark.parametrize("tokens", [-1, 0, 1, 7, 40, 99, 100, 101])
def test_only_the_tokens_that_there_are(tokens: int) -> None:
    """Whatever stands behind them; no more than there is room for, and as many as are told."""
    x, residual = normal(1, 100, 64), normal(1, 100, 64, seed=1)
    up, down = normal(96, 64, seed=2), normal(64, 96, seed=3)
    there = min(max(tokens, 0), 100)
    spoilt = x.copy()
    spoilt[0, there:] = np.nan
    row = (jnp.zeros(1, jnp.int32), jnp.full(1, there, jnp.int32), jnp.full(1, there, jnp.int32))
    norm = (jnp.ones(64), None, 1e-5)

    def calls(x: jax.Array, tokens: Any) -> list[jax.Array]:
        return [
            *cpu_kernels.products(x, [(jnp.asarray(up), None)] * 2, "gelu", tokens=tokens),
            cpu_kernels.linear_norm(x, (jnp.eye(64), None), jnp.asarray(residual), norm, tokens=tokens),
            cpu_kernels.feed_forward(x, (jnp.asarray(up), None), (jnp.asarray(down), None), None, norm, tokens=tokens),
            cpu_kernels.gated_feed_forward(x, *[(jnp.asarray(y), None) for y in (up, up, down)], "silu", tokens=tokens),
            cpu_kernels.attention(x, x, x, *row, head_dim=HEAD, scale=1.0, dtype=FLOAT32, tokens=tokens),
        ]

    some = jax.jit(calls)(spoilt, jnp.asarray(tokens, jnp.int32))
    for got, wanted in zip(some, jax.jit(lambda x: calls(x, None))(x), strict=True):
        np.testing.assert_allclose(got[:, :there], wanted[:, :there], rtol=0, atol=2e-6)


@pytest.mark.parametrize("act", [act for act in cpu_kernels.ACTIVATIONS if act is not None])
def test_activations_far_from_zero(act: str) -> None:
    """As XLA's, to rounding, for numbers of every size; and NaN stays NaN."""
    x = np.concatenate([np.linspace(-30, 30, 4001), [-1e30, 1e30, -1e-30, 0.0, np.nan]]).astype(np.float32)[
        None, :, None
    ]
    (got,) = jax.jit(lambda x: cpu_kernels.products(x, [(jnp.ones((1, 1)), None)], act))(x)
    wanted = np.asarray(activation(act)(jnp.asarray(x)))
    np.testing.assert_allclose(got, wanted, rtol=3e-7, atol=8e-7)


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


def test_layers_use_them_up_to_a_number_of_tokens() -> None:
    """And never outside of what is compiled for a batch, where there may be gradients."""
    layer, norm = Linear((HEAD, HEAD), ("embed", "heads"), "float32"), LayerNorm(HEAD, 1e-5)
    mesh = make_mesh(jax.devices()[:1])

    def single(x: jax.Array, act: str) -> jax.Array:
        return linears(x, [layer], act)[0]

    def double(x: jax.Array, act: str) -> jax.Array:
        return feed_forward(x, layer, act, layer, norm)

    def used(tokens: int, kernels: Kernels | None, act: str = "gelu", call: Callable[..., Any] = single) -> list[str]:
        with nullcontext() if kernels is None else right_padded(kernels):
            program = jax.jit(call, static_argnums=1).lower(normal(1, tokens, HEAD), act).as_text()
        return [name for name in cpu_library.Target if f"@{name}(" in program]

    some = Kernels(mesh, cpu_tokens=20)
    assert used(20, some) == used(20, some, "tanh") == ["jaxembed_linear"]
    assert used(20, some, call=double) == ["jaxembed_feed_forward"]
    assert used(20, some, "tanh", double) == ["jaxembed_linear", "jaxembed_linear_norm"]
    for call in (single, double):
        assert not used(21, some, call=call)
        assert not used(1, Kernels(mesh), call=call)
        assert not used(1, None, call=call)


def test_layers_of_two_dtypes() -> None:
    """Are no single call."""
    up, down = (Linear((HEAD, HEAD), ("embed", "mlp"), dtype) for dtype in ("bfloat16", "float32"))
    norm = LayerNorm(HEAD, 1e-5)
    with right_padded(Kernels(make_mesh(jax.devices()[:1]), cpu_tokens=20)):
        program = jax.jit(lambda x: feed_forward(x, up, "gelu", down, norm)).lower(normal(1, 4, HEAD)).as_text()
        both = jax.jit(lambda x: linears(x, [up, down])).lower(normal(1, 4, HEAD)).as_text()
    assert "@jaxembed_linear(" in program and "@jaxembed_linear_norm(" in program
    assert "@jaxembed_feed_forward(" not in program
    assert "@jaxembed_linear(" not in both


OF_HEADS = TINY | {"hidden_size": 2 * HEAD, "num_attention_heads": 2, "max_position_embeddings": 140}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: tiny_bert(hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=140),
    "bert, an activation that is not theirs": lambda: tiny_bert(hidden_size=HEAD, hidden_act="tanh"),
    "distilbert": lambda: randomise(
        DistilBertModel(DistilBertConfig(vocab_size=99, dim=64, n_heads=2, n_layers=2, hidden_dim=100)), 0
    ),
    "modernbert, with a window": lambda: randomise(
        ModernBertModel(ModernBertConfig(**OF_HEADS, pad_token_id=0, local_attention=8)), 0
    ),
    "qwen3, which is causal": lambda: randomise(
        Qwen3Model(Qwen3Config(**OF_HEADS, num_key_value_heads=1, head_dim=HEAD)), 0
    ),
    "mpnet, whose attention has a bias": lambda: randomise(
        MPNetModel(
            MPNetConfig(
                vocab_size=99,
                hidden_size=64,
                num_attention_heads=2,
                num_hidden_layers=2,
                intermediate_size=100,
                max_position_embeddings=66,
            ),
            add_pooling_layer=False,
        ),
        0,
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.usefixtures("kernels")
def test_whole_models_beside_torch(kind: str, tmp_path: Path, record_property: Record) -> None:
    """Every hidden state, padded and flat, within 1e-5."""
    record_property("largest difference", check_parity(MODELS[kind](), tmp_path))


def test_minilm_by_them_and_without(
    cache: Path, minilm_folder: Path, minilm: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same vectors to rounding, compiled and out of the cache; and they are really used."""
    mesh = make_mesh(jax.devices()[:1])
    # Times beside other tests say nothing.
    monkeypatch.setattr(kernel_choice, "worth", lambda _: 128)
    assert kernels_on(mesh, "float32").cpu_tokens == 128
    texts = ["a", "two words", "the rest of a longer sentence " * 5, "", "what is the capital of France?"]
    shapes = [Bucket(1, 8), Bucket(5, 64, 96)]
    wanted = minilm.encode(texts)
    for _ in range(2):
        embedder = Embedder.from_pretrained(minilm_folder, mesh=mesh, ladder=Ladder([*shapes, Bucket(1, 256)]))
        for text in texts:
            assert np.abs(embedder.encode([text]) - minilm.encode([text])).max() <= 1e-6
        assert np.abs(embedder.encode(texts) - wanted).max() <= 1e-6
        for bucket in shapes:
            program = embedder.engine._executables[bucket].as_text()
            assert all(name in program for name in OF_BERT)


def test_they_are_found_right_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """And attention is looked at in that dtype: one that is off by a hundredth is seen."""
    assert kernel_choice.right("bfloat16")
    true = cpu_kernels.attention

    def wrong(*arrays: Any, dtype: jnp.dtype, **options: Any) -> jax.Array:
        return true(*arrays, dtype=dtype, **options) * (1.01 if dtype == BFLOAT16 else 1.0)

    monkeypatch.setattr(cpu_kernels, "attention", wrong)
    assert not kernel_choice.right("bfloat16")


def test_minilm_in_bfloat16(
    cache: Path, minilm_folder: Path, minilm: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Next to the vectors in float32, as near as XLA's in bfloat16 (test_minilm); they are really used."""
    monkeypatch.setattr(kernel_choice, "worth", lambda _: max(kernel_choice.TIMED))
    texts = ["a", "two words", "the rest of a longer sentence " * 5, "", "what is the capital of France?"]
    shapes = [Bucket(5, 64, 96), Bucket(1, 256)]
    embedder = Embedder.from_pretrained(
        minilm_folder, dtype="bfloat16", mesh=make_mesh(jax.devices()[:1]), ladder=Ladder(shapes)
    )
    assert np.sum(embedder.encode(texts) * minilm.encode(texts), axis=1).min() >= 0.9995
    program = embedder.engine._executables[shapes[0]].as_text()
    assert all(name in program for name in OF_BERT)


def test_warmed_up_for_the_next_process(tiny_folder: Path, tmp_path: Path) -> None:
    """Executables that call them come out of the cache where nothing is loaded yet; the library is there once."""
    options = (f"--model={tiny_folder}", f"--cache-dir={tmp_path}", "--max-length=8", "--max-batch-tokens=8")
    command = [sys.executable, "-m", "jaxembed.warmup", *options]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    said = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        said.append(done.stdout.splitlines()[-1])
    assert len(list(tmp_path.glob("*/cpu_kernels/*"))) == 1
    assert said[0].endswith(", 0 from the cache")
    count = said[1].split()[0]
    assert said[1].endswith(f", {count} from the cache")
