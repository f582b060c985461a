"""ERNIE against transformers' ErnieModel on random configurations."""

from collections.abc import Callable
from typing import Any

import pytest
from parity import SIZES, TINY, save_checkpoint
from transformers import ErnieConfig, ErnieForPreTraining, ErnieForSequenceClassification, ErnieModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.models.ernie import Config


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"use_task_id": True},
        {"use_task_id": True, "task_type_vocab_size": 1, "type_vocab_size": 4, "hidden_act": "relu"},
        {"use_task_id": True, "task_type_vocab_size": 16, "type_vocab_size": 1, "layer_norm_eps": 1e-2},
        {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 4, "intermediate_size": 7},
    ],
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch, with task types and without."""
    parity(ErnieModel(ErnieConfig(**TINY | overrides)))


@pytest.mark.parametrize("kind", [ErnieForPreTraining, ErnieForSequenceClassification])
def test_an_encoder_inside_a_larger_model(kind: Any, parity: Callable[..., None]) -> None:
    """The prefix is found and the heads are left over."""
    whole = kind(ErnieConfig(**TINY, use_task_id=True))
    parity(whole.ernie, save=lambda _, folder: save_checkpoint(whole, folder))


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
        Config.from_hf(SIZES | overrides)


def test_task_types_are_only_there_where_the_file_says_so() -> None:
    """As in Hugging Face's ErnieConfig."""
    assert not Config.from_hf(SIZES).use_task_id
    assert Config.from_hf(SIZES | {"use_task_id": True}).task_type_vocab_size == 3
