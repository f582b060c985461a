"""Qwen3 against transformers' Qwen3Model: queries and keys normalised by head, heads of their own width."""

from collections.abc import Callable
from typing import Any

import pytest
from parity import TINY
from transformers import Qwen3Config, Qwen3Model

from jaxembed.models.qwen3 import Config

HEADS = {"num_key_value_heads": 2, "head_dim": 8}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10},
        {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6},
        {"attention_bias": True},
        {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        {"is_causal": False, "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0}, "num_hidden_layers": 3},
    ],
    ids=lambda overrides: "-".join(overrides) or "plain",
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch."""
    parity(Qwen3Model(Qwen3Config(**TINY | HEADS | overrides)))


def test_defaults_are_those_of_hugging_face() -> None:
    """Heads are 128 wide where the file says nothing, whatever the width of the model."""
    sizes = {"vocab_size": 9, "hidden_size": 48, "intermediate_size": 8, "num_hidden_layers": 1}
    read, theirs = Config.from_hf({**sizes, "num_attention_heads": 32}), Qwen3Config()
    assert (read.key_value_heads, read.head_size) == (theirs.num_key_value_heads, theirs.head_dim)
    assert read.max_length == theirs.max_position_embeddings
