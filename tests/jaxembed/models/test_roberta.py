"""RoBERTa, XLM-RoBERTa and CamemBERT against their originals: places that count from the padding token's id."""

from collections.abc import Callable
from typing import Any

import pytest
from parity import SIZES, TINY
from transformers import (
    CamembertConfig,
    CamembertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from jaxembed.models.roberta import Config

KINDS = {
    "roberta": (RobertaConfig, RobertaModel),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
    "camembert": (CamembertConfig, CamembertModel),
}


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("roberta", {}),
        ("roberta", {"pad_token_id": 0, "hidden_act": "relu"}),
        ("xlm-roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
        ("camembert", {"type_vocab_size": 1, "num_attention_heads": 4}),
    ],
)
def test_parity(kind: str, overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch, at the greatest length too."""
    config, model = KINDS[kind]
    parity(model(config(**TINY | {"pad_token_id": 1} | overrides)))


def test_514_positions_mean_512_tokens() -> None:
    """The places up to the padding token's are never used."""
    sizes = SIZES
    assert Config.from_hf({**sizes, "max_position_embeddings": 514, "pad_token_id": 1}).max_length == 512
