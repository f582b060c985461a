"""Llama against transformers' LlamaModel: options, rotary kinds, and checkpoints saved with a head."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from parity import SIZES, TINY, save_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.models.llama import Config

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"attention_bias": True},
        {"mlp_bias": True, "intermediate_size": 7},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
        {"num_attention_heads": 4, "num_key_value_heads": 1, "attention_bias": True},
        {"head_dim": 12, "rms_norm_eps": 1e-2},
        {"hidden_act": "gelu", "num_hidden_layers": 3, "max_position_embeddings": 9},
        {"is_causal": False},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}},
        {"rope_parameters": LLAMA3},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            }
        },
    ],
    ids=lambda overrides: "-".join(overrides) + overrides.get("rope_parameters", {}).get("rope_type", "") or "plain",
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch."""
    parity(LlamaModel(LlamaConfig(**TINY | overrides)))


@pytest.mark.parametrize("tied", [True, False])
def test_saved_with_its_head(tied: bool, parity: Callable[..., None]) -> None:
    """As a causal language model: names begin with "model.", and a head that is not tied is left over."""

    def save(hf_model: LlamaModel, folder: Path) -> Path:
        whole = LlamaForCausalLM(hf_model.config)
        whole.model = hf_model
        return save_checkpoint(whole, folder)

    parity(LlamaModel(LlamaConfig(**TINY, tie_word_embeddings=tied)), save=save)


def test_defaults_are_those_of_hugging_face() -> None:
    """An old file without a number for keys and values has as many as heads."""
    sizes = {name: SIZES[name] for name in SIZES if name != "max_position_embeddings"}
    read, theirs = Config.from_hf(sizes), LlamaConfig(**sizes)
    assert (read.key_value_heads, read.head_size, read.max_length) == (2, 8, theirs.max_position_embeddings)
    assert (read.rms_norm_eps, read.hidden_act) == (theirs.rms_norm_eps, theirs.hidden_act)


def test_an_old_field_wins_over_the_new_one() -> None:
    """`rope_scaling` beside `rope_parameters`, and a context length beside both: in transformers' order."""
    old = {"rope_type": "linear", "factor": 2.0}
    both = Config.from_hf({**SIZES, "rope_scaling": old, "rope_parameters": {"rope_type": "default"}})
    assert both.rotary == Config.from_hf({**SIZES, "rope_scaling": old}).rotary
    assert both.rotary != Config.from_hf(SIZES).rotary
    outer = Config.from_hf({**SIZES, "rope_scaling": LLAMA3, "original_max_position_embeddings": 12})
    inner = Config.from_hf({**SIZES, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 12}})
    assert outer.rotary == inner.rotary


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads do not divide into num_key_value_heads 3"),
        ({"head_dim": 7}, "7 wide"),
        ({"rope_scaling": {"type": "spiral"}}, "'spiral'"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}}},
            "rope_parameters are of full_attention; supported: one kind",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ],
)
def test_what_is_not_llama_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf({**SIZES, **overrides})


@pytest.mark.parametrize("field", sorted(set(SIZES) - {"max_position_embeddings"}))
def test_missing_field_is_named(field: str) -> None:
    """Sizes have no defaults here: a file without one is refused by name."""
    with pytest.raises(UnsupportedModelError, match=field):
        Config.from_hf({name: value for name, value in SIZES.items() if name != field})
