"""All kernels in C++ together: tokens that are not there, layers, whole models beside torch, and MiniLM."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from parity import HEAD, WIDE, check_parity, randomise, tiny_bert
from transformers import (
    DistilBertConfig,
    DistilBertModel,
    MistralConfig,
    MistralModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
)

from jaxembed import Bucket, Embedder, Ladder, cpu_kernels, cpu_library, kernel_choice, make_mesh
from jaxembed.kernel_choice import kernels_on
from jaxembed.kernels import Kernels, right_padded
from jaxembed.layers import FLOAT32, LayerNorm, Linear, feed_forward, linears

Record = Callable[[str, object], None]

BFLOAT16 = jnp.dtype("bfloat16")

OF_BERT = set(cpu_library.Target) - {cpu_library.Target.GATED_FEED_FORWARD}
"""What BERT's layers call."""

pytestmark = pytest.mark.usefixtures("library")


@pytest.fixture
def kernels() -> Iterator[None]:
    """What is traced in here may use them for any number of tokens."""
    with right_padded(Kernels(make_mesh(jax.devices()[:1]), cpu_tokens=1_000_000)):
        yield


@pytest.mark.parametrize(
    ("tokens", "room"), [*((tokens, 100) for tokens in (-1, 0, 1, 7, 40, 99, 100, 101)), (193, 210), (208, 210)]
)
def test_only_the_tokens_that_there_are(tokens: int, room: int) -> None:
    """Whatever stands behind them; no more than there is room for, and as many as are told."""
    x, residual = normal(1, room, 64), normal(1, room, 64, seed=1)
    up, down = normal(96, 64, seed=2), normal(64, 96, seed=3)
    there = min(max(tokens, 0), room)
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


LONG = WIDE | {"max_position_embeddings": 140}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: tiny_bert(hidden_size=2 * HEAD, num_attention_heads=2, max_position_embeddings=140),
    "bert, an activation that is not theirs": lambda: tiny_bert(hidden_size=HEAD, hidden_act="tanh"),
    "distilbert": lambda: randomise(
        DistilBertModel(DistilBertConfig(vocab_size=99, dim=64, n_heads=2, n_layers=2, hidden_dim=100)), 0
    ),
    "modernbert, with a window": lambda: randomise(
        ModernBertModel(ModernBertConfig(**LONG, pad_token_id=0, local_attention=8)), 0
    ),
    "mistral, causal with a window": lambda: randomise(
        MistralModel(MistralConfig(**LONG, num_key_value_heads=1, head_dim=HEAD, sliding_window=8)), 0
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
