"""DistilBERT against transformers' DistilBertModel on random configurations."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import check_parity, randomise, save_checkpoint
from transformers import DistilBertConfig, DistilBertForMaskedLM, DistilBertForSequenceClassification, DistilBertModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.models.distilbert import Config

SMALL: dict[str, Any] = {"vocab_size": 64, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 40}

PLACES: dict[str, Any] = {"max_position_embeddings": 32, "attn_implementation": "eager"}


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"activation": "relu", "n_heads": 4, "hidden_dim": 7},
        {"activation": "gelu_new", "n_heads": 1, "max_position_embeddings": 9, "n_layers": 1},
        {"dim": 36, "n_heads": 3, "n_layers": 5, "vocab_size": 101, "pad_token_id": 3},
    ],
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch."""
    parity(DistilBertModel(DistilBertConfig(**SMALL | PLACES | overrides)))


def test_sinusoidal_places_come_from_the_checkpoint(tmp_path: Path) -> None:
    """The table of sines is stored like a learned one."""
    hf_model = DistilBertModel(DistilBertConfig(**SMALL | PLACES, sinusoidal_pos_embds=True))
    table = hf_model.embeddings.position_embeddings.weight
    sines = table.detach().clone()
    assert torch.allclose(sines[:, 0], torch.sin(torch.arange(32.0)))
    randomise(hf_model, 0)
    table.data.copy_(sines)
    check_parity(hf_model, tmp_path)


@pytest.mark.parametrize("kind", [DistilBertForMaskedLM, DistilBertForSequenceClassification])
def test_an_encoder_inside_a_larger_model(kind: Any, parity: Callable[..., None]) -> None:
    """The prefix is found and the heads are left over."""
    whole = kind(DistilBertConfig(**SMALL | PLACES))
    parity(whole.distilbert, save=lambda _, folder: save_checkpoint(whole, folder))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"activation": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"n_heads": 3}, "16 does not divide into 3 heads"),
    ],
)
def test_what_is_unknown_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf(SMALL | overrides)


@pytest.mark.parametrize("field", sorted(SMALL))
def test_missing_field_is_named(field: str) -> None:
    """Sizes have no defaults, and are named as the file should."""
    with pytest.raises(UnsupportedModelError, match=f"'{field}'"):
        Config.from_hf({name: value for name, value in SMALL.items() if name != field})


def test_defaults() -> None:
    """What the file leaves out is as in Hugging Face's DistilBertConfig."""
    read = Config.from_hf(SMALL)
    assert (read.activation, read.max_length, read.hidden_size) == ("gelu", 512, 16)
