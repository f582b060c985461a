"""EuroBERT against transformers' EuroBertModel: Llama's layers without a causal mask."""

from collections.abc import Callable
from typing import Any

import pytest
from parity import SIZES, TINY
from transformers import EuroBertConfig, EuroBertModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.models import architecture
from jaxembed.models.eurobert import ARCHITECTURE, Config


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
        {"attention_bias": True, "mlp_bias": True},
        {"is_causal": True, "rms_norm_eps": 1e-2},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 250_000.0}, "num_hidden_layers": 3},
    ],
    ids=lambda overrides: "-".join(overrides) or "plain",
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch."""
    parity(EuroBertModel(EuroBertConfig(**TINY | {"pad_token_id": 0} | overrides)))


def test_hub_originals() -> None:
    """They name remote code, and have `rope_theta` by itself."""
    original = {
        **SIZES,
        "model_type": "eurobert",
        "rope_theta": 250_000,
        "auto_map": {"AutoModel": "modeling_eurobert.EuroBertModel"},
    }
    assert architecture(original) is ARCHITECTURE
    read = Config.from_hf(original)
    assert read == Config.from_hf({**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 250_000}})
    theirs = EuroBertConfig()
    assert read.rms_norm_eps == theirs.rms_norm_eps
    shorter = {name: value for name, value in original.items() if name != "max_position_embeddings"}
    assert Config.from_hf(shorter).max_length == theirs.max_position_embeddings


def test_rotary_positions_must_be_given() -> None:
    """A default is never guessed: remote code and its port need not have the same."""
    with pytest.raises(UnsupportedModelError, match="no rope_theta"):
        Config.from_hf(SIZES)
