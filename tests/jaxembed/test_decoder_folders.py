"""Whole folders of decoders: `encode` here against `SentenceTransformer.encode` there, and on two devices.

Where a folder names remote code the reference is what that code does, put together by hand.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from parity import TINY, cosines, randomise, save_checkpoint, small_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    Gemma3TextConfig,
    Gemma3TextModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2Model,
    Qwen3Config,
    Qwen3Model,
)

from jaxembed import Bucket, Embedder, Ladder, make_mesh
from jaxembed.errors import CorruptCheckpointError, UnsupportedModelError
from jaxembed.tokenizer import Tokenizer, TruncationSide

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
            assert kernel.sharding.shard_shape(kernel.shape) == (kernel.shape[0] // devices, 16)
        vectors.append(embedder.encode(TEXTS))
    worst = float(np.abs(vectors[0] - vectors[1]).max())
    record_property("max abs diff", f"{worst:.1e}")
    assert worst <= SAME


END = "<|endoftext|>"
REMOTE = {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"]}
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A tokenizer of bytes knows every text, café and 你好 among them.",
    "Instruct: find it\nQuery: where does the quick fox jump?",
]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer that puts no special tokens around a text, as Qwen2's."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=END, padding_side="left")


def change(file: Path, **fields: object) -> None:
    """Write other fields into a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def qwen2_tokenizer(folder: Path, **fields: object) -> Path:
    """Write the tokenizer's files as gte-Qwen2 has them, with these fields in tokenizer_config.json; the folder."""
    byte_tokenizer().save_pretrained(folder)
    change(folder / "tokenizer_config.json", **{"tokenizer_class": "Qwen2Tokenizer", "auto_map": REMOTE} | fields)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    return folder


@pytest.mark.parametrize("pooling", ["lasttoken", "mean"])
def test_the_original_of_gte_qwen2(pooling: str, tmp_path: Path, record_property: Record) -> None:
    """Remote code for model and tokenizer: in both directions, and the end token stands behind every text.

    A cut takes from the text before it. The mean, as of stella_en_1.5B_v5, counts it too.
    """
    tokenizer = byte_tokenizer()
    sizes = {"num_key_value_heads": 1, "vocab_size": len(tokenizer), "is_causal": False}
    hf_model = randomise(Qwen2Model(Qwen2Config(**TINY | sizes)), 0)
    save(hf_model, tmp_path, tokenizer, Pooling(16, pooling), Normalize())
    change(tmp_path / "config.json", auto_map={"AutoModel": "modeling_qwen.Qwen2Model"})
    settings = {"tokenizer_class": "Qwen2Tokenizer", "auto_map": REMOTE, "add_eos_token": True}
    change(tmp_path / "tokenizer_config.json", **settings)
    own = AutoTokenizer.from_pretrained(tmp_path)
    end = own.convert_tokens_to_ids(END)

    def reference(text: str, appended: list[int]) -> Any:
        kept = own(text)["input_ids"][: 32 - len(appended)]
        assert end not in kept, "transformers appends the end token by itself"
        with torch.no_grad():
            states = hf_model(input_ids=torch.tensor([[*kept, *appended]])).last_hidden_state[0]
        vector = states[-1] if pooling == "lasttoken" else states.mean(dim=0)
        return (vector / vector.norm()).numpy()

    embedder = Embedder.from_pretrained(tmp_path, ladder=Ladder([Bucket(8, 32)]), mesh=make_mesh(jax.devices()[:1]))
    texts = [*TEXTS, *SENTENCES]
    least = 1.0
    for name, prompt in [(None, ""), *PROMPTS.items()]:
        # Of no token at all there is nothing to pool but the end token.
        want = np.stack([reference(prompt + text, [end]) for text in texts])
        least = min(least, float(cosines(embedder.encode(texts, prompt_name=name), want).min()))
    assert least >= MIN_COSINE
    record_property("1 - min cosine", f"{1 - least:.1e}")
    without = np.stack([reference(text, []) for text in SENTENCES])
    assert cosines(embedder.encode(SENTENCES), without).max() < 0.999, "the end token changed nothing"


@pytest.mark.parametrize(
    "auto_map",
    [
        REMOTE,
        {"AutoTokenizer": "tokenization_qwen.Qwen2TokenizerFast"},
        {"AutoTokenizer": ["tokenization_qwen.Qwen2Tokenizer", None]},
        {"AutoTokenizer": [None, "Alibaba-NLP/gte-Qwen2-7B-instruct--tokenization_qwen.Qwen2TokenizerFast"]},
        ["tokenization_qwen.Qwen2Tokenizer", "tokenization_qwen.Qwen2TokenizerFast"],
    ],
)
def test_the_end_token_of_remote_qwen2(auto_map: object, tmp_path: Path) -> None:
    """It is a special token: it survives every cut, follows each text of a pair, and can be left away."""
    folder = qwen2_tokenizer(tmp_path, auto_map=auto_map, add_eos_token=True)
    tokenizer = Tokenizer.from_folder(folder, vocab_size=300, max_length=20)
    own = AutoTokenizer.from_pretrained(folder)
    end = own.convert_tokens_to_ids(END)
    plain = own(SENTENCES)["input_ids"]
    assert tokenizer.special_tokens == 1
    for length in range(1, 21):
        right = tokenizer.encode_texts(SENTENCES, truncate_to=length)
        left = tokenizer.encode_texts(SENTENCES, truncate_to=length, side=TruncationSide.LEFT)
        for ids, first, last in zip(plain, right, left, strict=True):
            keep = min(length - 1, len(ids))
            assert first.ids.tolist() == [*ids[:keep], end]
            assert last.ids.tolist() == [*ids[len(ids) - keep :], end]
    bare = tokenizer.encode_texts(SENTENCES, truncate_to=20, add_special_tokens=False)
    assert [one.ids.tolist() for one in bare] == [ids[:20] for ids in plain]
    assert tokenizer.encode_texts([""])[0].ids.tolist() == [end]
    pair = tokenizer.encode_pairs([("quick fox", "lazy dog")])[0]
    assert pair.ids.tolist() == [*own("quick fox")["input_ids"], end, *own("lazy dog")["input_ids"], end]


@pytest.mark.parametrize("settings", [{}, {"add_eos_token": False}])
def test_remote_qwen2_without_an_end_token(settings: dict[str, object], tmp_path: Path) -> None:
    """Then it puts nothing around a text, whatever tokenizer.json says."""
    folder = qwen2_tokenizer(tmp_path, **settings)
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, 0)])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(folder, vocab_size=300, max_length=20)
    assert tokenizer.special_tokens == 0
    assert 0 not in tokenizer.encode_texts(["quick fox"])[0].ids


def test_an_end_token_that_is_not_there(tmp_path: Path) -> None:
    """Nothing to append: an error, not a tokenizer that appends nothing."""
    folder = qwen2_tokenizer(tmp_path, add_eos_token=True, eos_token=None)
    with pytest.raises(CorruptCheckpointError, match="add_eos_token, but there is no eos_token"):
        Tokenizer.from_folder(folder, vocab_size=300, max_length=20)


@pytest.mark.parametrize("name", ["tokenization_qwen.QWenTokenizer", "tokenization_other.Qwen2TokenizerFast"])
def test_other_remote_tokenizers_are_refused(name: str, tmp_path: Path) -> None:
    """transformers would load its own class of tokenizer_class in silence."""
    folder = qwen2_tokenizer(tmp_path, auto_map={"AutoTokenizer": [None, name]})
    known = "tokenization_qwen.Qwen2Tokenizer, tokenization_qwen.Qwen2TokenizerFast"
    with pytest.raises(UnsupportedModelError, match=f"remote code '{name}', which is never run here; .*: {known}"):
        Tokenizer.from_folder(folder, vocab_size=300, max_length=20)


@pytest.mark.parametrize("auto_map", [{}, {"AutoTokenizer": None}, {"AutoProcessor": "processing_qwen.Processor"}])
def test_no_remote_tokenizer(auto_map: Mapping[str, object], tmp_path: Path) -> None:
    """Without a class in auto_map the tokenizer is transformers' own: its files say what stands around a text."""
    folder = qwen2_tokenizer(tmp_path, auto_map=auto_map)
    assert Tokenizer.from_folder(folder, vocab_size=300, max_length=20).special_tokens == 0
