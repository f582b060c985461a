"""DeBERTa v2 and v3 against transformers: every kind of score, distances in buckets, the convolution."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import SIZES, check_parity, randomise, save_checkpoint
from transformers import (
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    PreTrainedModel,
)
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from jaxembed.errors import UnsupportedModelError
from jaxembed.models.deberta_v2 import Config, log_buckets

V3 = {
    "relative_attention": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
"""As v3's checkpoints are; v2's larger ones have the convolution too."""


def tiny(**overrides: Any) -> DebertaV2Model:
    """A small model with Hugging Face's first weights; it has no choice of attention."""
    return DebertaV2Model(DebertaV2Config(**SIZES | overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        V3,
        V3 | {"max_position_embeddings": 192, "position_buckets": 32, "num_attention_heads": 4},
        V3 | {"max_position_embeddings": 64, "position_buckets": 9, "max_relative_positions": 24},
        V3 | {"conv_kernel_size": 3, "conv_act": "gelu", "hidden_act": "gelu_new"},
        V3 | {"conv_kernel_size": 5, "conv_groups": 4, "num_hidden_layers": 1},
        V3 | {"share_att_key": False, "norm_rel_ebd": "none"},
        V3 | {"share_att_key": False, "pos_att_type": ["c2p"], "num_hidden_layers": 3},
        V3 | {"share_att_key": False, "pos_att_type": ["p2c"], "layer_norm_eps": 1e-2},
        V3 | {"pos_att_type": ["c2p"]},
        V3 | {"pos_att_type": ["p2c"], "position_buckets": -1},
        V3 | {"pos_att_type": None},
        V3 | {"position_buckets": -1, "max_relative_positions": 7},
        V3 | {"embedding_size": 12, "position_biased_input": True, "type_vocab_size": 3},
        {},
        {"relative_attention": False, "pos_att_type": "c2p|p2c", "type_vocab_size": 2, "conv_kernel_size": 1},
        {"relative_attention": True, "pos_att_type": "c2p", "embedding_size": 20, "vocab_size": 101},
    ],
    ids=lambda overrides: (
        "-".join(f"{name}={value}" for name, value in overrides.items() if V3.get(name) != value)
        or ("v3" if overrides else "plain")
    ),
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch."""
    parity(tiny(**overrides))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (DebertaV2ForMaskedLM, {"legacy": True}),
        (DebertaV2ForMaskedLM, {"legacy": False}),
        (DebertaV2ForSequenceClassification, {}),
    ],
)
def test_encoders_inside_larger_models(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    """Heads, old and new, are left over, and so is the table of places that v3 keeps without using it."""

    def save(encoder: PreTrainedModel, folder: Path) -> Path:
        whole = kind(encoder.config)
        whole.deberta = encoder
        places = {"deberta.embeddings.position_embeddings.weight": torch.zeros(32, 16)}
        save_checkpoint(whole, folder)
        whole.save_pretrained(folder, state_dict={**whole.state_dict(), **places})
        return folder

    check_parity(randomise(tiny(**V3, **options), 1), tmp_path, save=save)


@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (32, 128), (128, 512), (9, 24), (2, 32), (64, 1000)])
def test_buckets_are_torchs(buckets: int, furthest: int) -> None:
    """At every distance, on both sides; all beyond the table are one row of it."""
    distance = np.arange(-5000, 5001)
    theirs = make_log_bucket_position(torch.from_numpy(distance), buckets, furthest).to(torch.long).numpy()
    ours = log_buckets(distance, buckets, furthest)
    np.testing.assert_array_equal(np.clip(ours, -buckets, buckets - 1), np.clip(theirs, -buckets, buckets - 1))


def test_places_are_a_limit_only_where_there_is_a_table_of_them() -> None:
    """v3 has none: a longer input is possible, as in transformers."""
    assert Config.from_hf(SIZES | V3).max_length is None
    assert Config.from_hf(SIZES).max_length == 32


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"conv_kernel_size": 3, "conv_act": "fantasy"}, "activation is 'fantasy'"),
        ({"conv_kernel_size": 4}, "conv_kernel_size is 4"),
        ({"conv_kernel_size": 3, "conv_groups": 3}, "conv_groups 3"),
        ({"pos_att_type": "p2c|p2p"}, "pos_att_type has 'p2p'; supported: c2p, p2c"),
        ({"norm_rel_ebd": "rms_norm"}, "norm_rel_ebd has 'rms_norm'"),
        ({"attention_head_size": 4}, "attention_head_size is 4"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
        (V3 | {"position_buckets": 1}, "position_buckets is 1"),
        (V3 | {"position_buckets": 32, "max_relative_positions": 17}, "position_buckets is 32"),
    ],
)
def test_what_is_not_deberta_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf(SIZES | overrides)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_missing_field_is_named(field: str) -> None:
    """Sizes have no defaults here."""
    with pytest.raises(UnsupportedModelError, match=field):
        Config.from_hf({name: value for name, value in SIZES.items() if name != field})
