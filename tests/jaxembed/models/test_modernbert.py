"""ModernBERT against transformers' ModernBertModel: windows, two thetas, norms and biases that may be absent."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from parity import TINY, randomise, save_checkpoint
from safetensors.numpy import load_file
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel, PreTrainedModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.loading import load
from jaxembed.models.modernbert import FULL, SLIDING, Config

SPECIAL = {f"{name}_token_id": n for n, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
LONG = {**TINY, **SPECIAL, "num_hidden_layers": 4, "local_attention": 8, "max_position_embeddings": 40}
"""Rows of 40 tokens, of which the layers that look nearby see 4 on either side."""

OLD = {"global_attn_every_n_layers": 3, "global_rope_theta": 160_000.0, "local_rope_theta": 10_000.0}
"""What config.json said before transformers 5, with the values of ModernBERT itself."""

SMALL = {name: LONG[name] for name in LONG if name not in (*SPECIAL, "attn_implementation")}


def rope(**kinds: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of both types of layer, as transformers 5 writes them."""
    return {"rope_parameters": {FULL: kinds["full"], SLIDING: kinds["sliding"]}}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
        {"attention_bias": True, "hidden_activation": "silu"},
        {"norm_bias": True, "norm_eps": 1e-2, "num_attention_heads": 4},
        {"mlp_bias": True, "intermediate_size": 7, "hidden_activation": "gelu_new", "local_attention": 5},
        {"global_attn_every_n_layers": 1, "num_hidden_layers": 2},
        {"global_attn_every_n_layers": 2, "local_attention": 2},
        {"global_attn_every_n_layers": 7, "local_attention": 1, "num_hidden_layers": 3},
        {"layer_types": [SLIDING, SLIDING, FULL], "num_hidden_layers": 3},
        {"sliding_window": 3},
        {"max_position_embeddings": 200, "num_attention_heads": 4},
        {"global_rope_theta": 500.0, "local_rope_theta": 50.0},
        rope(
            full={"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
            sliding={"rope_type": "default", "rope_theta": 20.0},
        ),
        rope(
            full={"rope_type": "yarn", "factor": 4.0, "rope_theta": 900.0, "original_max_position_embeddings": 10},
            sliding={"rope_type": "default", "rope_theta": 20.0},
        ),
    ],
    ids=lambda overrides: "-".join(overrides) or "plain",
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch, in rows much longer than a window."""
    parity(ModernBertModel(ModernBertConfig(**LONG | overrides)), seed=len(overrides))


@pytest.mark.parametrize(
    "old",
    [{}, {"global_attn_every_n_layers": 2}, {"global_rope_theta": 700.0, "local_rope_theta": 70.0}],
    ids=lambda old: "-".join(old) or "plain",
)
def test_parity_of_an_old_config(old: dict[str, Any], parity: Callable[..., None]) -> None:
    """The keys of before transformers 5 give the same model, also where the file has others that mean nothing here."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        file = save_checkpoint(model, folder) / "config.json"
        config = json.loads(file.read_text())
        for name in ("layer_types", "rope_parameters"):
            del config[name]
        config |= OLD | old | {"position_embedding_type": "absolute", "reference_compile": None}
        file.write_text(json.dumps(config))
        return folder

    parity(ModernBertModel(ModernBertConfig(**LONG | OLD | old)), save=save)


def test_encoder_inside_a_language_model(tmp_path: Path) -> None:
    """A checkpoint with "model." before each name and a head beside it loads, and the head is left out."""
    model = randomise(ModernBertForMaskedLM(ModernBertConfig(**LONG)), 0)
    names = set(load_file(save_checkpoint(model, tmp_path) / "model.safetensors"))
    assert {"head.dense.weight", "decoder.bias", "model.final_norm.weight"} <= names
    paths = load(tmp_path).paths
    assert "final_norm.scale" in paths
    assert "layers.0.attention_norm.scale" not in paths and "layers.1.attention_norm.scale" in paths


def test_old_and_new_form_read_the_same() -> None:
    """Absent keys mean what the first ModernBERT's file says."""
    plain = Config.from_hf(SMALL)
    assert plain == Config.from_hf(SMALL | OLD)
    types = [FULL, SLIDING, SLIDING, FULL]
    rotary = rope(full={"rope_theta": 160_000.0}, sliding={"rope_theta": 10_000.0})
    assert plain == Config.from_hf({**SMALL, **rotary, "layer_types": types})
    assert (plain.window, plain.max_length) == (4, 40)
    assert plain.full != plain.sliding
    shared = Config.from_hf({**SMALL, "global_rope_theta": 9.0, "local_rope_theta": None})
    assert shared.full == shared.sliding == Config.from_hf({**SMALL, "global_rope_theta": 9.0}).full


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_activation": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"layer_types": [FULL] * 3 + ["chunked_attention"]}, "layer_types names 'chunked_attention'; supported"),
        ({"layer_types": [FULL] * 3}, "layer_types names 3 layers of 4"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, "keys .'rope_theta', 'rope_type'.; supp"),
        ({"rope_parameters": {FULL: {"rope_type": "longrope"}}}, "rope_type is 'longrope'"),
        ({"rope_parameters": {FULL: {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is {'rope_type': 'linear'"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
    ],
)
def test_what_is_not_modernbert_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf({**SMALL, **overrides})


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
)
def test_missing_field_is_named(field: str) -> None:
    """Sizes have no defaults here: a file without one is refused by name."""
    with pytest.raises(UnsupportedModelError, match=field):
        Config.from_hf({name: value for name, value in SMALL.items() if name != field})
