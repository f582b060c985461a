"""The kernels in C++: each size, each kind of row, threads beside each other, and whole models beside torch."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest
from parity import check_parity, randomise, tiny_bert
from scipy.special import erf
from transformers import DistilBertConfig, DistilBertModel, MPNetConfig, MPNetModel

from jaxembed import Bucket, Embedder, Ladder, cpu_kernels, kernel_choice, make_mesh
from jaxembed.kernel_choice import kernels_on
from jaxembed.kernels import Kernels, right_padded
from jaxembed.layers import Linear, exact_gelu, linears
from jaxembed.tokens import Rows

Record = Callable[[str, object], None]
Floats = npt.NDArray[np.float32]

HEAD = 32
"""Features of a head that every CPU's kernel takes."""

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def kernels() -> Iterator[None]:
    """What is traced in here may use them for any number of tokens."""
    with right_padded(Kernels(make_mesh(jax.devices()[:1]), cpu_tokens=1_000_000)):
        yield


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("depth", "width"), [(1, 1), (5, 3), (8, 48), (100, 50), (384, 96), (400, 131), (1536, 49)])
@pytest.mark.parametrize("act", [None, "gelu"])
def test_products(depth: int, width: int, act: str | None) -> None:
    """Within what float32 does to sums: whole panels, tiles and blocks and parts of them; with a bias and without."""
    kernel, bias = normal(width, depth, seed=1000) / np.float32(depth**0.5), normal(width)
    inputs = [normal(1, tokens, depth, seed=tokens) for tokens in (1, 7, 8, 9, 16, 17, 31, 33, 64, 100, 257)]

    @jax.jit
    def call(inputs: list[jax.Array], *given: jax.Array) -> list[tuple[jax.Array, ...]]:
        return [cpu_kernels.products(x, [(given[0], given[1]), (given[0], None)], act) for x in inputs]

    for x, got in zip(inputs, call(inputs, kernel, bias), strict=True):
        plain = x.astype(np.float64) @ kernel.astype(np.float64).T
        for one, wanted in zip(got, (plain + bias, plain), strict=True):
            if act is not None:
                wanted = 0.5 * wanted * (1 + erf(wanted * 0.5**0.5))
            np.testing.assert_allclose(one, wanted, atol=1e-6 + 2.5e-7 * depth**0.5)


def test_gelu_far_from_zero() -> None:
    """As XLA's, to rounding, for numbers of every size; and NaN stays NaN."""
    x = np.concatenate([np.linspace(-30, 30, 4001), [-1e30, 1e30, -1e-30, 0.0, np.nan]]).astype(np.float32)[
        None, :, None
    ]
    (got,) = jax.jit(lambda x: cpu_kernels.products(x, [(jnp.ones((1, 1)), None)], "gelu"))(x)
    wanted = np.asarray(exact_gelu(jnp.asarray(x)))
    np.testing.assert_allclose(got, wanted, rtol=3e-7, atol=8e-7)


ROWS = ([1], [8], [40, 1, 17], [0, 3, 0, 16, 0], [130, 2, 129], [15, 16, 17, 31, 32, 33], [700])


@pytest.mark.parametrize("lengths", ROWS)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, HEAD), (4, 1, HEAD), (1, 1, 128)])
@pytest.mark.parametrize("flat", [False, True])
def test_attention(lengths: list[int], heads: int, kv_heads: int, width: int, flat: bool) -> None:
    """As the formula, for rows in lines of their own and one behind another; finite everywhere."""
    told, length = np.array(lengths, np.int32), max(lengths)
    if flat:
        # Some room behind the last row.
        rows = Rows.in_line(jnp.asarray(told), jnp.asarray(told), tokens=int(told.sum()) + 5, length=length)
        shape = (1, int(told.sum()) + 5)
    else:
        rows, shape = Rows(jnp.arange(length)[None] < told[:, None]), (len(told), length)
    q, (k, v) = normal(*shape, heads * width), normal(2, *shape, kv_heads * width, seed=1)
    options = {"head_dim": width, "scale": width**-0.5}
    mixed = jax.jit(lambda *y: cpu_kernels.attention(*y, rows.starts, rows.lengths, jnp.asarray(told), **options))
    got = np.asarray(mixed(q, k, v))
    assert np.isfinite(got).all()
    q, k, v, got = (x.reshape(-1, x.shape[-1] // width, width).astype(np.float64) for x in (q, k, v, got))
    for start, count in zip(np.asarray(rows.starts), told, strict=True):
        row = slice(start, start + count)
        for head in range(heads):
            key, value = (x[row, head // (heads // kv_heads)] for x in (k, v))
            weights = np.exp(q[row, head] @ key.T * width**-0.5)
            np.testing.assert_allclose(got[row, head], weights @ value / weights.sum(axis=1, keepdims=True), atol=2e-6)


def test_tokens_that_are_no_keys_have_outputs() -> None:
    """Those behind `seen` see the first ones, as ColBERT's masks do."""
    q, k, v = normal(3, 1, 20, HEAD)
    numbers = (jnp.array([0]), jnp.array([20]), jnp.array([5]))
    got = jax.jit(lambda *y: cpu_kernels.attention(*y, *numbers, head_dim=HEAD, scale=1.0))(q, k, v)
    weights = np.exp(q[0].astype(np.float64) @ k[0, :5].T)
    np.testing.assert_allclose(got[0], weights @ v[0, :5] / weights.sum(axis=1, keepdims=True), atol=2e-6)


def test_scores_of_any_size() -> None:
    """Large ones overflow no exponential."""
    q, k, v = normal(3, 1, 40, HEAD)
    numbers = (jnp.array([0]), jnp.array([40]), jnp.array([40]))
    got = jax.jit(lambda *y: cpu_kernels.attention(*y, *numbers, head_dim=HEAD, scale=1e4))(q, k, v)
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
    layer = Linear((HEAD, HEAD), ("embed", "heads"), "float32")
    mesh = make_mesh(jax.devices()[:1])

    def used(tokens: int, kernels: Kernels | None, act: str | None = "gelu") -> bool:
        def call(x: jax.Array) -> jax.Array:
            return linears(x, [layer], act)[0]

        with nullcontext() if kernels is None else right_padded(kernels):
            return "jaxembed_linear" in jax.jit(call).lower(normal(1, tokens, HEAD)).as_text()

    assert used(20, Kernels(mesh, cpu_tokens=20))
    assert used(20, Kernels(mesh, cpu_tokens=20), "relu")
    assert not used(21, Kernels(mesh, cpu_tokens=20))
    assert not used(1, Kernels(mesh))
    assert not used(1, None)


MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: tiny_bert(hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=140),
    "bert, an activation that is not theirs": lambda: tiny_bert(hidden_size=HEAD, hidden_act="relu"),
    "distilbert": lambda: randomise(
        DistilBertModel(DistilBertConfig(vocab_size=99, dim=64, n_heads=2, n_layers=2, hidden_dim=100)), 0
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
    monkeypatch.setattr(kernel_choice, "worth", lambda: 128)
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
            assert all(name in program for name in cpu_kernels.TARGETS)


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
