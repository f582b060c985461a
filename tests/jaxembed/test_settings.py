"""sentence_bert_config.json: each setting is honoured as sentence-transformers does, or refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import TEXTS, compare, load, reload, save, tiny_transformer, write
from parity import randomise, save_checkpoint, small_tokenizer, tiny_bert
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from jaxembed.checkpoint import INSTRUCTOR, Checkpoint
from jaxembed.errors import CorruptCheckpointError, UnsupportedModelError
from jaxembed.types import Pooling as PoolingModes
from jaxembed.types import PoolingMode

SETTINGS = "sentence_bert_config.json"
TOKENIZER = "tokenizer_config.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that sentence-transformers wrote, to be changed."""
    return save(tmp_path / "model", [tiny_transformer(tmp_path / "hf", num_hidden_layers=1), Pooling(16, "mean")])


def change(folder: Path, name: str, **changes: Any) -> None:
    """Change a JSON file; None takes a key out."""
    given = json.loads((folder / name).read_text()) | changes
    write(folder, {name: {key: value for key, value in given.items() if value is not None}})


@pytest.mark.parametrize(
    ("settings", "tokenizer", "expected"),
    [
        ({}, {}, 32),
        ({}, {"model_max_length": 12}, 12),
        ({}, {"model_max_length": None, "max_len": 13}, 13),
        ({}, {"model_max_length": None}, 32),
        ({}, {"model_max_length": 10**30}, 32),
        ({}, {"model_max_length": 100}, 32),
        ({"max_seq_length": 20}, {"model_max_length": 12}, 20),
        ({"max_seq_length": 9}, {"model_max_length": 12}, 9),
        ({"max_seq_length": 20, "tokenizer_args": {"model_max_length": 11}}, {}, 11),
        ({"max_seq_length": 20, "processor_kwargs": {"model_max_length": 14}}, {"model_max_length": 30}, 14),
        ({"processing_kwargs": {"text": {"max_length": 8}}}, {"model_max_length": 12}, 8),
        ({"max_seq_length": 7, "processing_kwargs": {"text": {"max_length": 8}, "common": {"max_length": 10}}}, {}, 10),
    ],
    ids=str,
)
def test_lengths(settings: dict[str, Any], tokenizer: dict[str, Any], expected: int, folder: Path) -> None:
    """Whoever says how long a text may be: the vectors of texts that are cut are the same."""
    change(folder, SETTINGS, **settings)
    change(folder, TOKENIZER, **tokenizer)
    ours, theirs = load(folder), reload(folder)
    assert ours.max_length == expected
    assert theirs.preprocess(["a b c d e f g " * 20])["input_ids"].shape[1] == expected
    compare(ours, theirs, [*TEXTS, "a b c d e f g " * 20])


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": True},
        {"unpad_inputs": False},
        {"model_args": {"torch_dtype": "float32", "attn_implementation": "eager"}},
        {"model_kwargs": {"add_pooling_layer": False, "trust_remote_code": True}},
        {"tokenizer_args": {"padding_side": "right", "use_fast": True, "trust_remote_code": True}},
        {"processing_kwargs": {"text": {"padding": "max_length", "truncation": True, "max_length": 32}}},
        {"processing_kwargs": {"image": {"size": 3}, "text": {"pad_to_multiple_of": 8}}},
        {"config_args": {"layer_norm_eps": 0.1}},
        {"config_kwargs": {"hidden_act": "relu", "trust_remote_code": True}},
        {"modality_config": None, "module_output_name": None, "transformer_task": None},
    ],
    ids=str,
)
def test_what_is_honoured(settings: dict[str, Any], folder: Path) -> None:
    """Settings that change the vectors change ours alike; the others are left aside."""
    before = load(folder).encode(TEXTS)
    change(folder, SETTINGS, **settings)
    ours = load(folder)
    compare(ours, reload(folder))
    changed = np.abs(ours.encode(TEXTS) - before).max() > 1e-3
    assert changed == any(name.startswith("config_") for name in settings)


TEXT = {"method": "forward", "method_output_name": "last_hidden_state"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transformer_task": "text-generation"}, "transformer_task is 'text-generation'; supported: feature-extr"),
        ({"transformer_task": "retrieval"}, "transformer_task is 'retrieval'"),
        ({"modality_config": {"text": TEXT, "message": TEXT}}, "texts go through a chat template"),
        ({"modality_config": {"text": {**TEXT, "method_output_name": "pooler_output"}}}, "modality_config is .*pooler"),
        (
            {"modality_config": {"text": {**TEXT, "method_output_name": ["hidden_states", -2]}}},
            r"modality_config is .*'hidden_states', -2",
        ),
        ({"modality_config": {"image": TEXT}}, "modality_config is .*image"),
        ({"module_output_name": "sentence_embedding"}, "module_output_name is 'sentence_embedding'"),
        ({"tokenizer_name_or_path": "another/one"}, "tokenizer_name_or_path is 'another/one'"),
        ({"tokenizer_args": {"add_prefix_space": True}}, "processor_kwargs is {'add_prefix_space': True}"),
        ({"model_args": {"variant": "fp16"}}, "model_kwargs is {'variant': 'fp16'}"),
        ({"processing_kwargs": {"text": {"add_special_tokens": False}}}, "processing_kwargs is {'add_special_tokens'"),
        ({"processing_kwargs": {"common": {"truncation": False}}}, "processing_kwargs is {'truncation': False}"),
        ({"query_length": 32}, "query_length is 32"),
        ({"document_length": 32}, "document_length is 32"),
        ({"query_expansion": {"length": 32}}, "query_expansion is {'length': 32}"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], message: str, folder: Path) -> None:
    """By name and value."""
    change(folder, SETTINGS, **settings)
    with pytest.raises(UnsupportedModelError, match=message):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_seq_length": "long"}, "a length is no number among .*'long'"),
        ({"model_args": ["x"]}, r"model_kwargs is \['x'\]; it must be an object"),
        ({"config_kwargs": 3}, "config_kwargs is 3; it must be an object"),
        ({"processing_kwargs": {"text": 3}}, "processing_kwargs is .*it must hold objects"),
        ({"processing_kwargs": [3]}, "processing_kwargs is .*it must hold objects"),
        ({"modality_config": ["text"]}, r"modality_config is \['text'\]; it must be an object"),
    ],
)
def test_what_is_malformed(settings: dict[str, Any], message: str, folder: Path) -> None:
    """No traceback of ours."""
    change(folder, SETTINGS, **settings)
    with pytest.raises(CorruptCheckpointError, match=message):
        Checkpoint.open(folder)


def test_an_adapter_is_refused(folder: Path) -> None:
    """Its weights would be left out."""
    write(folder, {"adapter_config.json": {"peft_type": "LORA", "base_model_name_or_path": "x/y"}})
    with pytest.raises(UnsupportedModelError, match=r"holds an adapter .*merge it into its model first"):
        Checkpoint.open(folder)


QWEN = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("whole", [False, True], ids=["encoder", "language model"])
def test_decoders_of_transformers_alone(whole: bool, tmp_path: Path) -> None:
    """A language model's last token, but the mean of one that was saved without its head."""
    config = Qwen3Config(**QWEN, tie_word_embeddings=True)
    save_checkpoint(randomise((Qwen3ForCausalLM if whole else Qwen3Model)(config), 0), tmp_path)
    ours = load(tmp_path)
    assert ours.model.checkpoint.pooling == PoolingModes((PoolingMode.LAST_TOKEN if whole else PoolingMode.MEAN,))
    texts = [text for text in TEXTS if text]
    compare(ours, SentenceTransformer(str(tmp_path), device="cpu"), texts)


@pytest.mark.parametrize("file", [TOKENIZER, "chat_template.jinja"])
def test_a_chat_template_without_modules(file: str, tmp_path: Path) -> None:
    """sentence-transformers would make a conversation of each text; with modules of an older version it does not."""
    template = "{% for message in messages %}{{ message['role'] }} x {{ message['content'] }}{% endfor %}"
    save_checkpoint(tiny_bert(), tmp_path)
    if file == TOKENIZER:
        change(tmp_path, TOKENIZER, chat_template=template)
    else:
        write(tmp_path, {file: template.encode()})
    with pytest.raises(UnsupportedModelError, match=r"has a chat template and no modules\.json"):
        Checkpoint.open(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    theirs.save(str(tmp_path / "saved"), create_model_card=False)
    with pytest.raises(UnsupportedModelError, match="texts go through a chat template"):
        Checkpoint.open(tmp_path / "saved")
    change(tmp_path / "saved", SETTINGS, modality_config=None, module_output_name=None)
    compare(load(tmp_path / "saved"), reload(tmp_path / "saved"))


@pytest.mark.parametrize("name", [*INSTRUCTOR, "somebody/else"])
def test_instructor_leaves_prompts_out(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known by name alone, as sentence-transformers knows them."""
    dense = randomise(Dense(16, 8, activation_function=nn.Identity()), 0)
    save(folder, [*reload(folder).children(), dense])
    monkeypatch.setattr("jaxembed.checkpoint.resolve", lambda name, revision: folder)
    pooling = Checkpoint.open(name).pooling
    assert pooling is not None
    assert pooling.include_prompt == (name == "somebody/else")


def test_a_tokenizer_without_a_length(tmp_path: Path) -> None:
    """Positions of -1 are none, as XLNet's; the architecture's own number is left."""
    save_checkpoint(tiny_bert(), tmp_path)
    change(tmp_path, "config.json", max_position_embeddings=-1)
    small_tokenizer().save_pretrained(tmp_path)
    assert Checkpoint.open(tmp_path).max_length is None
