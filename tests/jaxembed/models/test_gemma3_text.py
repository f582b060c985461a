"""Gemma 3 and EmbeddingGemma against transformers' Gemma3TextModel: four norms a layer, windows, two rotary kinds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity import TINY, save_checkpoint
from transformers import Gemma3TextConfig, Gemma3TextModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.models.gemma3_text import Config

SMALL = {
    **TINY,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
}
SIZES = {name: SMALL[name] for name in SMALL if name != "attn_implementation"}
BOTH = {"use_bidirectional_attention": True}
LINEAR = {"rope_type": "linear", "rope_theta": 5_000.0, "factor": 8.0}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        BOTH,
        {**BOTH, "sliding_window": 7},
        {**BOTH, "sliding_window": 2},
        {**BOTH, "sliding_window": 14, "max_position_embeddings": 50},
        {"sliding_window": 1},
        {"sliding_window": 5, "is_causal": False},
        {"layer_types": None},
        {"layer_types": ["full_attention", "sliding_attention"], **BOTH},
        {"query_pre_attn_scalar": 3, "attention_bias": True},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, **BOTH},
        {"hidden_activation": "silu", "rms_norm_eps": 1e-2},
        {
            "rope_parameters": {
                "full_attention": LINEAR,
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ],
    ids=lambda overrides: "-".join(f"{name}={value}" for name, value in overrides.items())[:60] or "plain",
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch, in rows much longer than the window."""
    # With seed 0 there is a token at which both, in float32, are 4e-6 to 9e-6 off what torch computes in float64.
    parity(Gemma3TextModel(Gemma3TextConfig(**SMALL | overrides)), seed=2)


def test_a_file_of_old(parity: Callable[..., None]) -> None:
    """`rope_theta` and `rope_scaling` for layers that see everything, `rope_local_base_freq` for the others."""
    old = {"rope_theta": 3_000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}, "rope_local_base_freq": 50.0}

    def save(hf_model: Gemma3TextModel, folder: Path) -> Path:
        save_checkpoint(hf_model, folder)
        file = folder / "config.json"
        config = json.loads(file.read_text())
        del config["rope_parameters"]
        file.write_text(json.dumps({**config, **old}))
        return folder

    parity(Gemma3TextModel(Gemma3TextConfig(**SMALL, **old)), save=save)
    read = Config.from_hf({**SIZES, **old})
    assert read.rotary.frequencies[0] == 1 / 4
    assert read.sliding_rotary.frequencies[0] == 1
    np.testing.assert_allclose(read.sliding_rotary.frequencies[2], 50.0**-0.5, rtol=1e-6)


@pytest.mark.parametrize("pattern", [1, 2, 6])
def test_every_so_many_layers_see_everything(pattern: int) -> None:
    """Where the file does not name the kind of each layer."""
    sizes = {**SIZES, "num_hidden_layers": 13, "layer_types": None, "sliding_window_pattern": pattern}
    kinds = Gemma3TextConfig(**sizes).layer_types
    assert Config.from_hf(sizes).windows == tuple(5 if kind == "sliding_attention" else None for kind in kinds)


@pytest.mark.parametrize("window", [6, 7, 512])
def test_the_window_of_the_file_is_its_whole_width(window: int) -> None:
    """In both directions transformers halves it, adds 1 and leaves the bound out: half of it on either side is seen."""
    stored = Gemma3TextConfig(**SMALL | BOTH | {"sliding_window": window})
    assert Config.from_hf({**SIZES, **BOTH, "sliding_window": window}).radius == stored.sliding_window - 1
    assert Config.from_hf(stored.to_dict()).radius == stored.sliding_window - 1 == window // 2
    assert Config.from_hf({**SIZES, "sliding_window": window}).radius == window - 1


def test_defaults_are_those_of_hugging_face() -> None:
    """What an EmbeddingGemma need not write."""
    sizes = {"vocab_size": 9, "hidden_size": 48, "intermediate_size": 8, "num_hidden_layers": 6}
    read, theirs = Config.from_hf({**sizes, "num_attention_heads": 8}), Gemma3TextConfig()
    assert (read.key_value_heads, read.head_size) == (theirs.num_key_value_heads, theirs.head_dim)
    assert read.attention_scale == theirs.query_pre_attn_scalar**-0.5
    assert (read.max_length, read.hidden_act) == (theirs.max_position_embeddings, theirs.hidden_activation)
    assert read.windows == (4095,) * 5 + (None,)
    assert read.rotary != read.sliding_rotary
    for rotary, kind in ((read.rotary, "full_attention"), (read.sliding_rotary, "sliding_attention")):
        theta = theirs.rope_parameters[kind]["rope_theta"]
        np.testing.assert_allclose(rotary.frequencies[64], theta**-0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"use_bidirectional_attention": "vision"}, "use_bidirectional_attention is 'vision'"),
        ({**BOTH, "is_causal": False}, "supported: one"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "one for each of full_attention"),
        (
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 0.5}}},
            "partial_rotary_factor is 0.5",
        ),
        ({"hidden_activation": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"sliding_window": None}, "there is no sliding_window"),
        ({"layer_types": ["full_attention"]}, "names 1 layers"),
    ],
)
def test_what_is_not_gemma3_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf({**SIZES, **overrides})
