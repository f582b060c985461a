"""Whole folders of decoders: `encode` here against `SentenceTransformer.encode` there, and on two devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from parity import TINY, cosines, randomise, save_checkpoint, small_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import processors
from transformers import (
    Gemma3TextConfig,
    Gemma3TextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)

from jaxembed import Bucket, Embedder, Ladder, make_mesh

MIN_COSINE = 0.999999
SAME = 1e-6
"""Largest difference from ourselves on other devices."""

PROMPTS = {"query": "Instruct: find it\nQuery: ", "document": ""}
TEXTS = ["a b c", "hello world", "x", "", "0 1 2 3 4 5 6", "x y z " * 20, "one two three four", "   spaces\tkept "]

Record = Callable[[str, object], None]


def tiny_qwen3(**overrides: Any) -> Qwen3Model:
    """A random Qwen3 with more query heads than key and value heads."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return randomise(Qwen3Model(Qwen3Config(**TINY | heads | overrides)), 0)


def tiny_gemma3() -> Gemma3TextModel:
    """A random EmbeddingGemma with a single key and value head, and a window shorter than its rows."""
    config = Gemma3TextConfig(
        **TINY,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
    )
    return randomise(Gemma3TextModel(config), 0)


def appending_tokenizer(padding_side: str) -> PreTrainedTokenizerFast:
    """One that puts an end token behind every text and nothing before it; padding is that token, as in Qwen3's."""
    backend = small_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="$A [SEP]", pair="$A [SEP] $B:1 [SEP]:1", special_tokens=[("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        eos_token="[SEP]",
        pad_token="[SEP]",
        padding_side=padding_side,
    )


def save(hf_model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerFast, *behind: Any) -> None:
    """Write a model and the modules behind it as sentence-transformers does."""
    hf = save_checkpoint(hf_model, folder / "hf")
    tokenizer.save_pretrained(hf)
    chain = SentenceTransformer(modules=[Transformer(str(hf)), *behind], device="cpu", prompts=PROMPTS)
    chain.save(str(folder), create_model_card=False)


def compare(folder: Path, padding_side: str) -> float:
    """The least cosine over all prompts, after checking it."""
    # Loaded anew: what the folder says, not what was in memory.
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert theirs.tokenizer.padding_side == padding_side
    ours = Embedder.from_pretrained(folder, ladder=Ladder([Bucket(8, 32)]), mesh=make_mesh(jax.devices()[:1]))
    assert ours.max_length == theirs.max_seq_length == 32
    pairs = [
        (ours.encode(TEXTS, prompt_name=name), theirs.encode(TEXTS, prompt_name=name)) for name in (None, *PROMPTS)
    ]
    pairs.append((ours.encode_query(TEXTS), theirs.encode_query(TEXTS)))
    for got, want in pairs:
        assert got.shape == want.shape
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    assert np.abs(pairs[0][0] - pairs[1][0]).max() > 1e-2, "the query's prompt changed nothing"
    least = min(float(cosines(got, want).min()) for got, want in pairs)
    assert least >= MIN_COSINE
    return least


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("appends", [False, True], ids=["both-ends", "end-token"])
def test_last_token(padding_side: str, appends: bool, tmp_path: Path, record_property: Record) -> None:
    """Qwen3-Embedding's folder: the last token's vector is the same on whichever side a tokenizer pads."""
    tokenizer = appending_tokenizer(padding_side) if appends else small_tokenizer(padding_side=padding_side)
    save(tiny_qwen3(), tmp_path, tokenizer, Pooling(16, "lasttoken"), Normalize())
    record_property("1 - min cosine", f"{1 - compare(tmp_path, padding_side):.1e}")


def test_a_window_and_padding_on_the_left(tmp_path: Path, record_property: Record) -> None:
    """Windows count places between tokens, so padding does not move them."""
    hf_model = tiny_qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=1)
    save(hf_model, tmp_path, appending_tokenizer("left"), Pooling(16, "lasttoken"), Normalize())
    record_property("1 - min cosine", f"{1 - compare(tmp_path, 'left'):.1e}")


def test_embedding_gemma(tmp_path: Path, record_property: Record) -> None:
    """EmbeddingGemma's folder: in both directions, mean pooling and two Dense modules."""
    behind = [
        Pooling(16, "mean"),
        Dense(16, 24, bias=False, activation_function=torch.nn.Identity()),
        Dense(24, 16, bias=False, activation_function=torch.nn.Identity()),
        Normalize(),
    ]
    save(tiny_gemma3(), tmp_path, small_tokenizer(padding_side="right"), *behind)
    record_property("1 - min cosine", f"{1 - compare(tmp_path, 'right'):.1e}")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_two_devices_share_the_weights(kv_heads: int, tmp_path: Path, record_property: Record) -> None:
    """Heads split over two devices: whole ones, several queries to each key, or a single one cut in half."""
    save(
        tiny_qwen3(num_key_value_heads=kv_heads),
        tmp_path,
        appending_tokenizer("left"),
        Pooling(16, "lasttoken"),
        Normalize(),
    )
    vectors = []
    for devices in (1, 2):
        mesh = make_mesh(jax.devices()[:devices], model_parallel=devices)
        embedder = Embedder.from_pretrained(tmp_path, ladder=Ladder([Bucket(8, 32)]), mesh=mesh)
        for name in ("query", "key", "value"):
            kernel = embedder.model.params[f"layers.1.{name}.kernel"]
            assert kernel.sharding.shard_shape(kernel.shape) == (16, kernel.shape[1] // devices)
        vectors.append(embedder.encode(TEXTS))
    worst = float(np.abs(vectors[0] - vectors[1]).max())
    record_property("max abs diff", f"{worst:.1e}")
    assert worst <= SAME
