"""Mistral against transformers' MistralModel: one window for all layers."""

from collections.abc import Callable
from typing import Any

import pytest
from parity import SIZES, TINY
from transformers import MistralConfig, MistralModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.models.mistral import Config


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 1},
        {"sliding_window": 2},
        {"sliding_window": 7, "num_hidden_layers": 3},
        {"sliding_window": 7, "max_position_embeddings": 200},
        {"sliding_window": 31},
        {"sliding_window": 32},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "sliding_window": 5},
        {"is_causal": False},
        {"is_causal": False, "sliding_window": 4},
        {"is_causal": False, "sliding_window": None},
    ],
    ids=lambda overrides: "-".join(f"{name}={value}" for name, value in overrides.items()) or "plain",
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Windows from the token alone to the whole row, which is longer than twice most of them."""
    parity(MistralModel(MistralConfig(**TINY | {"num_key_value_heads": 2} | overrides)))


def test_defaults_are_those_of_hugging_face() -> None:
    """Where the file says nothing: eight key and value heads and a window of 4096."""
    sizes = {"vocab_size": 9, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 2}
    read, theirs = Config.from_hf({**sizes, "num_attention_heads": 16}), MistralConfig()
    assert (read.key_value_heads, read.head_size) == (theirs.num_key_value_heads, 2)
    assert (read.max_length, read.sliding_window) == (theirs.max_position_embeddings, theirs.sliding_window)
    assert read.windows == (4095, 4095)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"sliding_window": 0}, "sliding_window is 0"),
    ],
)
def test_what_is_not_mistral_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf({**SIZES, "num_key_value_heads": 2, **overrides})
