"""Flat shapes with room to spare: kernels compute the tokens that there are, and nothing looks behind the last one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import save, tiny_transformer
from parity import HEAD, SIZES, TINY, TOLERANCE, WIDE, randomise, save_checkpoint, tiny_bert
from sentence_transformers import SparseEncoder
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from jaxembed import Bucket, Ladder, cpu_kernels, make_mesh, program
from jaxembed import engine as engine_module
from jaxembed.cost import COUNTED_PRICES
from jaxembed.engine import Engine
from jaxembed.kernels import Kernels
from jaxembed.loading import load
from jaxembed.packing import Row, pack
from jaxembed.types import Encoding, Output, PoolingMode

pytestmark = pytest.mark.usefixtures("library", "poisoned")

LENGTHS = (5, 1, 16, 2)
ROOM = Bucket(6, 16, 90)
ALONE = Bucket(1, 16)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels are there, on one CPU, and what they leave as it was is NaN: it may be anything."""
    for user in (engine_module, program):
        monkeypatch.setattr(user, "kernels_on", lambda mesh, _: Kernels(mesh, cpu_tokens=512 * (mesh.size == 1)))

    def spoilt(call: Callable[..., Any]) -> Callable[..., Any]:
        def result(*given: Any, tokens: jax.Array | None = None, **options: Any) -> Any:
            def spoil(y: jax.Array) -> jax.Array:
                there = jnp.arange(y.shape[0] * y.shape[1], dtype=jnp.int32).reshape(*y.shape[:2], 1)
                return y if tokens is None else jnp.where(there < tokens, y, jnp.nan)

            return jax.tree.map(spoil, call(*given, tokens=tokens, **options))

        return result

    for name in ("products", "linear_norm", "feed_forward", "gated_feed_forward", "attention", "embed"):
        monkeypatch.setattr(cpu_kernels, name, spoilt(getattr(cpu_kernels, name)))


def both(folder: Path, output: Output = Output.DENSE) -> tuple[list[Any], list[Any]]:
    """What each of some rows gives alone, padded; and all of them together, with room behind them."""
    model = load(folder, mesh=make_mesh(jax.devices()[:1]))
    engine = Engine(model, Ladder([ALONE, ROOM]), output=output)
    assert engine.counted
    for bucket in (ALONE, ROOM):
        engine.compile(bucket)
    ids = [np.random.default_rng(n).integers(5, 60, n, np.int32) for n in LENGTHS]
    rows = [Row(Encoding(one), engine.dimension, False, i) for i, one in enumerate(ids)]
    batch = pack(ROOM, rows)
    assert (engine.computed(batch), engine.computed(pack(ALONE, rows[:1]))) == (sum(LENGTHS), 16)
    alone = [engine.run(pack(ALONE, [row]))[0] for row in rows]
    # A program that has run before leaves what may look right.
    engine.run(pack(ROOM, [Row(Encoding(np.full(16, 7, np.int32)), engine.dimension, False, i) for i in range(5)]))
    together = list(engine.run(batch))
    if output is Output.TOKENS:
        alone, together = ([y[:n] for y, n in zip(some, LENGTHS, strict=True)] for some in (alone, together))
    return alone, together


def check(folder: Path, output: Output = Output.DENSE) -> None:
    """The same, and numbers."""
    for one, other in zip(*both(folder, output), strict=True):
        assert np.isfinite(one).all()
        np.testing.assert_allclose(other, one, rtol=0, atol=TOLERANCE)


HEADS = {"num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, Callable[[], Any]] = {
    "bert": lambda: tiny_bert(hidden_size=64, num_attention_heads=2),
    "mpnet, whose attention has a bias": lambda: MPNetModel(MPNetConfig(**SIZES), add_pooling_layer=False),
    "deberta, with a convolution": lambda: DebertaV2Model(
        DebertaV2Config(
            **SIZES,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            conv_kernel_size=3,
            conv_act="gelu",
        )
    ),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**TINY, pad_token_id=0, local_attention=8)),
    "modernbert of wide heads": lambda: ModernBertModel(ModernBertConfig(**WIDE, pad_token_id=0, local_attention=8)),
    "qwen3, which is causal": lambda: Qwen3Model(Qwen3Config(**TINY | HEADS)),
    "qwen3 of wide heads": lambda: Qwen3Model(Qwen3Config(**WIDE, num_key_value_heads=1, head_dim=HEAD)),
    "gemma3": lambda: Gemma3TextModel(Gemma3TextConfig(**TINY | HEADS, pad_token_id=0)),
    "t5": lambda: T5EncoderModel(
        T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=40, num_layers=2, num_heads=2, pad_token_id=0)
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_architectures(kind: str, tmp_path: Path) -> None:
    """Whether attention is theirs or XLA's."""
    check(save_checkpoint(randomise(MODELS[kind](), 0).eval(), tmp_path))


@pytest.mark.parametrize("mode", PoolingMode)
def test_pooling(mode: PoolingMode, tmp_path: Path) -> None:
    """Sums, maxima and single tokens."""
    transformer = tiny_transformer(tmp_path / "hf")
    check(save(tmp_path / "model", [transformer, Pooling(TINY["hidden_size"], mode.value)]))


def test_token_vectors(tmp_path: Path) -> None:
    """Each token's own."""
    check(save_checkpoint(tiny_bert(), tmp_path), Output.TOKENS)


def test_sparse_vectors(tmp_path: Path) -> None:
    """The largest logit of each entry of the vocabulary."""
    hf = save_checkpoint(randomise(BertForMaskedLM(BertConfig(**TINY)), 0), tmp_path / "hf")
    SparseEncoder(str(hf), device="cpu").save_pretrained(str(tmp_path / "model"), create_model_card=False)
    check(tmp_path / "model", Output.SPARSE)


@pytest.mark.parametrize(("tokens", "counted"), [(64, True), (512, True), (1024, False)])
def test_only_what_they_take_is_counted(tokens: int, counted: bool, tmp_path: Path) -> None:
    """Larger batches are XLA's, and pay for what there is room for."""
    model = load(save_checkpoint(tiny_bert(), tmp_path), mesh=make_mesh(jax.devices()[:1]))
    engine = Engine(model, max_batch_tokens=tokens)
    assert engine.counted is counted
    assert (engine.ladder.prices == COUNTED_PRICES) is counted
    assert all(bucket.flat for bucket in engine.ladder.buckets) is counted
    several = Engine(load(tmp_path, mesh=make_mesh(jax.devices()[:2])), max_batch_tokens=64)
    assert not several.counted
