"""MPNet against transformers' MPNetModel on random configurations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from parity import SIZES, TINY, save_checkpoint
from transformers import MPNetConfig, MPNetForMaskedLM, MPNetForSequenceClassification, MPNetModel
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

from jaxembed.errors import UnsupportedModelError
from jaxembed.models.mpnet import BUCKETS, FURTHEST, Config
from jaxembed.relative import log_buckets


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"hidden_act": "relu", "num_attention_heads": 4, "relative_attention_num_buckets": 40},
        {"hidden_act": "gelu_new", "num_attention_heads": 1, "pad_token_id": 0, "layer_norm_eps": 1e-2},
        {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 4, "intermediate_size": 7},
        {"max_position_embeddings": 4, "num_hidden_layers": 1, "vocab_size": 101},
        {"max_position_embeddings": 290},
    ],
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch, at distances of every bucket too."""
    parity(MPNetModel(MPNetConfig(**TINY | overrides)))


@pytest.mark.parametrize("kind", [MPNetForMaskedLM, MPNetForSequenceClassification])
def test_an_encoder_inside_a_larger_model(kind: Any, parity: Callable[..., None]) -> None:
    """The prefix is found and the heads are left over."""
    whole = kind(MPNetConfig(**TINY))
    parity(whole.mpnet, save=lambda _, folder: save_checkpoint(whole, folder))


def test_buckets_are_those_of_the_reference() -> None:
    """At every distance, those included where its logarithm falls on a whole number."""
    distances = np.arange(-100_000, 100_001)
    want = MPNetEncoder.relative_position_bucket(torch.from_numpy(distances)).numpy()
    np.testing.assert_array_equal(log_buckets(distances, BUCKETS, FURTHEST), want)
    assert set(want) == set(range(32)) - {16}


def test_places_count_from_two() -> None:
    """514 positions mean 512 tokens, whatever the padding token's id."""
    assert Config.from_hf(SIZES | {"max_position_embeddings": 514, "pad_token_id": 0}).max_length == 512


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"relative_attention_num_buckets": 24}, "relative_attention_num_buckets is 24"),
        ({"hidden_act": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
    ],
)
def test_what_is_not_supported_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf(SIZES | overrides)
