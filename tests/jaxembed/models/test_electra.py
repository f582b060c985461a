"""ELECTRA against transformers' ElectraModel on random configurations."""

from collections.abc import Callable
from typing import Any

import pytest
from parity import SIZES, TINY, save_checkpoint
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForSequenceClassification,
    ElectraModel,
)

from jaxembed.errors import UnsupportedModelError
from jaxembed.models.electra import Config


@pytest.mark.parametrize(
    "overrides",
    [
        {"embedding_size": 16},
        {"embedding_size": 12},
        {"embedding_size": 20, "hidden_act": "relu", "num_attention_heads": 4, "type_vocab_size": 1},
        {"embedding_size": 1, "hidden_act": "gelu_new", "type_vocab_size": 5, "layer_norm_eps": 1e-2},
        {"embedding_size": 7, "hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 4},
        {"embedding_size": 8, "vocab_size": 101, "max_position_embeddings": 9, "intermediate_size": 7},
    ],
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch, with tables of the layers' width and of others."""
    parity(ElectraModel(ElectraConfig(**TINY | overrides)))


@pytest.mark.parametrize(
    "kind", [ElectraForPreTraining, ElectraForMaskedLM, ElectraForMultipleChoice, ElectraForSequenceClassification]
)
def test_an_encoder_inside_a_larger_model(kind: Any, parity: Callable[..., None]) -> None:
    """The prefix is found, and the heads of discriminator and generator are left over."""
    whole = kind(ElectraConfig(**TINY, embedding_size=12))
    parity(whole.electra, save=lambda _, folder: save_checkpoint(whole, folder))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"is_decoder": True}, "is_decoder"),
    ],
)
def test_what_is_not_supported_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf(SIZES | {"embedding_size": 12} | overrides)


def test_the_width_of_the_tables_must_be_given() -> None:
    """Sizes have no defaults."""
    with pytest.raises(UnsupportedModelError, match="embedding_size"):
        Config.from_hf(SIZES)
