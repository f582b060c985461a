"""Qwen2 against transformers' Qwen2Model: biases, windows in late layers, both directions, and the hub originals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import SIZES, TINY, save_checkpoint
from transformers import PreTrainedModel, Qwen2Config, Qwen2Model

from jaxembed.errors import UnsupportedModelError
from jaxembed.models import architecture
from jaxembed.models.qwen2 import ARCHITECTURE, ORIGINAL, Config

SMALL = SIZES | {"num_key_value_heads": 2}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6},
        {"use_sliding_window": False, "sliding_window": 4},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 3},
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        {"is_causal": False},
        {"is_causal": False, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "rms_norm_eps": 1e-3},
    ],
    ids=lambda overrides: "-".join(overrides) or "plain",
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch."""
    parity(Qwen2Model(Qwen2Config(**TINY | {"num_key_value_heads": 2} | overrides)))


def test_defaults_are_those_of_hugging_face() -> None:
    """Where the file says nothing: no window, though one has a width."""
    sizes = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 30}
    read, theirs = Config.from_hf({**sizes, "num_attention_heads": 32}), Qwen2Config()
    assert (read.key_value_heads, read.max_length) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
    assert read.windows == (None,) * 30
    windowed = Config.from_hf({**sizes, "num_attention_heads": 32, "use_sliding_window": True})
    assert windowed.windows == (None,) * theirs.max_window_layers + (4095,) * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "there is no sliding_window"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types has chunked_attention"),
        ({"layer_types": ["full_attention"]}, "names 1 layers; num_hidden_layers is 2"),
        ({"use_sliding_window": True, "sliding_window": 0, "max_window_layers": 0}, "sliding_window is 0"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, "'mrope'"),
    ],
)
def test_what_is_not_qwen2_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf({**SMALL, **overrides})


REMOTE = {"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}, "model_type": "qwen2"}


def save_original(hf_model: PreTrainedModel, folder: Path) -> Path:
    """Write a model with the config.json of gte-Qwen2, which is older than `layer_types` and `rope_parameters`."""
    save_checkpoint(hf_model, folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["layer_types"]
    theta = config.pop("rope_parameters")["rope_theta"]
    older = {"rope_theta": theta, "sliding_window": 131_072, "use_sliding_window": False, **REMOTE}
    file.write_text(json.dumps({**config, **older}))
    return folder


@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_parity_of_the_original(theta: float, parity: Callable[..., None]) -> None:
    """Under the remote class's name, in both directions."""
    rope = {"rope_type": "default", "rope_theta": theta}
    config = Qwen2Config(**TINY | {"num_key_value_heads": 1, "is_causal": False, "rope_parameters": rope})
    parity(Qwen2Model(config), save=save_original)


def test_the_original_by_its_class() -> None:
    """The remote class leads to its own reading of config.json, the model_type alone to transformers'."""
    assert architecture({**SMALL, **REMOTE}) is ORIGINAL
    assert architecture({**SMALL, "model_type": "qwen2"}) is ARCHITECTURE
    assert ORIGINAL.config({**SMALL, **REMOTE, "is_causal": False, "sliding_window": 4}).windows == (None, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "is_causal is None; the remote code Qwen2Model is replaced where config.json says False"),
        ({"is_causal": None}, "is_causal is None"),
        ({"is_causal": True}, "is_causal is True"),
        ({"is_causal": False, "use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window is True"),
        ({"is_causal": False, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"is_causal": False, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"is_causal": False, "head_dim": 6}, "head_dim is 6; .* says 8"),
    ],
)
def test_what_the_original_does_not_know_is_refused(overrides: dict[str, Any], message: str) -> None:
    """transformers' class honours these; the remote code ignores them, or differs from revision to revision."""
    with pytest.raises(UnsupportedModelError, match=message):
        ORIGINAL.config({**SMALL, **REMOTE, **overrides})
