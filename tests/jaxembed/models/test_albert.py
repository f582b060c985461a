"""ALBERT against transformers' AlbertModel on random configurations."""

from collections.abc import Callable
from typing import Any

import pytest
from parity import SIZES, TINY, save_checkpoint
from transformers import AlbertConfig, AlbertForPreTraining, AlbertForSequenceClassification, AlbertModel

from jaxembed.architecture import Weight
from jaxembed.errors import UnsupportedModelError
from jaxembed.models.albert import ARCHITECTURE, Config
from jaxembed.weights import checkpoint_name

SMALL = SIZES | {"embedding_size": 12}


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_hidden_layers": 4},
        {"embedding_size": 16, "hidden_act": "gelu", "num_attention_heads": 4, "type_vocab_size": 1},
        {"embedding_size": 20, "hidden_act": "relu", "type_vocab_size": 5, "layer_norm_eps": 1e-2},
        {"embedding_size": 7, "hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 7},
        {"num_hidden_layers": 5, "num_hidden_groups": 2, "vocab_size": 101, "max_position_embeddings": 9},
        {"num_hidden_layers": 3, "num_hidden_groups": 3, "inner_group_num": 2},
        {"num_hidden_layers": 2, "inner_group_num": 3},
        {"num_hidden_layers": 12, "num_hidden_groups": 11},
        {"num_hidden_layers": 2, "num_hidden_groups": 4},
    ],
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch, in groups of all kinds."""
    parity(AlbertModel(AlbertConfig(**TINY | {"embedding_size": 12} | overrides)))


@pytest.mark.parametrize("kind", [AlbertForPreTraining, AlbertForSequenceClassification])
def test_an_encoder_inside_a_larger_model(kind: Any, parity: Callable[..., None]) -> None:
    """The prefix is found and the heads are left over."""
    whole = kind(AlbertConfig(**TINY, embedding_size=12))
    parity(whole.albert, save=lambda _, folder: save_checkpoint(whole, folder))


def test_defaults() -> None:
    """What the file leaves out is as in Hugging Face's AlbertConfig: the activation is not BERT's."""
    read = Config.from_hf(SMALL)
    assert (read.hidden_act, read.num_hidden_groups, read.inner_group_num) == ("gelu_new", 1, 1)
    assert read.turns == (0, 0)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("groups.0.1.up.bias", "encoder.albert_layer_groups.0.albert_layers.1.ffn.bias"),
        ("groups.10.2.up.bias", "encoder.albert_layer_groups.10.albert_layers.2.ffn.bias"),
        ("groups.2.13.up.bias", "encoder.albert_layer_groups.2.albert_layers.13.ffn.bias"),
        ("embeddings.word.table", "embeddings.word_embeddings.weight"),
    ],
)
def test_two_numbers_in_a_name(path: str, name: str) -> None:
    """The group's number is {n} in the table and the inner layer's {m}; neither takes the other's place."""
    assert checkpoint_name(ARCHITECTURE, ARCHITECTURE.weights, path) == Weight(name)


def test_two_numbers_without_a_line_are_named() -> None:
    """Who adds an architecture learns which parameter has no line."""
    with pytest.raises(UnsupportedModelError, match=r"models/albert: .* no line for 'groups\.\{n\}\.\{m\}\.gate'"):
        checkpoint_name(ARCHITECTURE, ARCHITECTURE.weights, "groups.0.1.gate")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"hidden_act": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
    ],
)
def test_what_is_not_supported_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf(SMALL | overrides)
