"""BERT against transformers' BertModel on random configurations."""

from collections.abc import Callable
from typing import Any

import pytest
from parity import TINY
from transformers import BertConfig, BertModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.models.bert import Config

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"hidden_act": "relu", "num_attention_heads": 4, "type_vocab_size": 1},
        {"hidden_act": "gelu_new", "num_attention_heads": 1, "type_vocab_size": 5},
        {"hidden_act": "silu", "layer_norm_eps": 1e-2, "intermediate_size": 7},
        {"vocab_size": 101, "max_position_embeddings": 9, "num_hidden_layers": 1},
        {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 4, "layer_norm_eps": 1e-5},
    ],
    ids=lambda overrides: "-".join(f"{name}={value}" for name, value in overrides.items()) or "plain",
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch."""
    parity(BertModel(BertConfig(**TINY | overrides)), seed=len(overrides))


def test_config_reads_what_the_file_says() -> None:
    """Fields that the file gives win over the defaults of Hugging Face, which fill in the rest."""
    plain = Config.from_hf(SMALL)
    assert (plain.hidden_act, plain.max_length, plain.type_vocab_size) == ("gelu", 512, 2)
    assert plain.layer_norm_eps == 1e-12
    given = Config.from_hf({**SMALL, "hidden_act": "relu", "max_position_embeddings": 77, "unknown_field": 1})
    assert (given.hidden_act, given.max_length) == ("relu", 77)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
    ],
)
def test_what_is_not_bert_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf({**SMALL, **overrides})


@pytest.mark.parametrize("field", sorted(SMALL))
def test_missing_field_is_named(field: str) -> None:
    """Sizes have no defaults here: a file without one is refused by name."""
    with pytest.raises(UnsupportedModelError, match=field):
        Config.from_hf({name: value for name, value in SMALL.items() if name != field})


def test_absolute_positions_may_be_spelled_out_or_left_out() -> None:
    """Older savers write the position type, newer ones nothing or null."""
    for value in ("absolute", None):
        assert Config.from_hf({**SMALL, "position_embedding_type": value}) == Config.from_hf(SMALL)
