"""T5's and mT5's encoders against transformers, in rows long enough for the last bucket of distances."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from parity import check_parity, randomise, save_checkpoint
from safetensors.torch import load_file, save_file
from transformers import MT5Config, MT5EncoderModel, PreTrainedModel, T5Config, T5EncoderModel, T5Model
from transformers.models.t5.modeling_t5 import T5Attention

from jaxembed.errors import UnsupportedModelError, WeightsError
from jaxembed.loading import load
from jaxembed.models.t5 import Config
from jaxembed.relative import log_buckets
from jaxembed.sharding import make_mesh

TINY = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2}
"""The sizes under T5's own names."""

KINDS = {"t5": (T5Config, T5EncoderModel), "mt5": (MT5Config, MT5EncoderModel)}


def tiny(kind: str = "t5", **overrides: Any) -> PreTrainedModel:
    """A small encoder with Hugging Face's first weights."""
    config, model = KINDS[kind]
    return model(config(**TINY | {"attn_implementation": "eager"} | overrides))


def save_as_t5(model: PreTrainedModel, folder: Path) -> Path:
    """Give queries and embeddings the size that T5 starts them with, and save.

    Its scores are not divided by sqrt(H): its queries are smaller by that much, and its embeddings are near 1. With the
    random weights as they are, torch's own rounding in rows of 512 tokens is above the tolerance (against float64).
    """
    with torch.no_grad():
        model.shared.weight.mul_(model.config.d_model**0.5)
        for block in model.encoder.block:
            block.layer[0].SelfAttention.q.weight.mul_(model.config.d_kv**-0.5)
    return save_checkpoint(model, folder)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("t5", {}),
        ("t5", {"d_kv": 5, "num_heads": 3, "layer_norm_epsilon": 1e-2}),
        ("t5", {"feed_forward_proj": "gated-gelu", "d_kv": 12, "num_layers": 3}),
        ("t5", {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 12}),
        ("t5", {"feed_forward_proj": "gelu", "relative_attention_max_distance": 300, "vocab_size": 101}),
        ("mt5", {}),
        ("mt5", {"feed_forward_proj": "gated-relu", "relative_attention_num_buckets": 7, "num_heads": 1}),
    ],
)
def test_parity(kind: str, overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch: rows of up to 512 tokens."""
    parity(tiny(kind, **overrides), save=save_as_t5)


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_whole_checkpoints_serve_their_encoder(kept: str, tmp_path: Path) -> None:
    """The decoder and a language model's head are left over; the shared table may have either name or both."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        save_as_t5(model, folder)
        weights = load_file(folder / "model.safetensors")
        table = weights.pop("shared.weight")
        whole = randomise(T5Model(model.config), seed=5).state_dict()
        decoder = {name: value for name, value in whole.items() if name.startswith("decoder.")}
        save_file({**weights, **decoder, kept: table, "lm_head.weight": table.clone()}, folder / "model.safetensors")
        return folder

    check_parity(randomise(tiny(), 0), tmp_path, save=save)


def test_the_encoders_own_table_wins(tmp_path: Path) -> None:
    """Where both names hold different numbers, the encoder reads its own, as in transformers."""
    folder = save_checkpoint(randomise(tiny(), 0), tmp_path)
    weights = load_file(folder / "model.safetensors")
    own = torch.full_like(weights["shared.weight"], 0.25)
    save_file({**weights, "encoder.embed_tokens.weight": own}, folder / "model.safetensors", {"format": "pt"})
    ours = load(folder, mesh=make_mesh(jax.devices()[:1])).params["word.table"]
    np.testing.assert_array_equal(np.asarray(ours), own.numpy())
    theirs = T5EncoderModel.from_pretrained(folder).encoder.embed_tokens.weight
    np.testing.assert_array_equal(theirs.detach().numpy(), own.numpy())


def test_biases_of_every_layer_are_refused(tmp_path: Path) -> None:
    """A checkpoint of UMT5's kind, which has them, never loads as T5."""
    folder = save_checkpoint(randomise(tiny(), 0), tmp_path)
    weights = load_file(folder / "model.safetensors")
    name = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    save_file({**weights, name.format(1): weights[name.format(0)].clone()}, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)unexpected.*block\.1"):
        load(folder)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (32, 127), (12, 128), (7, 100), (64, 1000), (4, 2)])
def test_buckets_are_torchs(buckets: int, furthest: int) -> None:
    """At every distance, on both sides, where the logarithm falls on a whole number too."""
    distance = np.arange(-5000, 5001)
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(distance), True, buckets, furthest)
    np.testing.assert_array_equal(log_buckets(distance, buckets, furthest), theirs.numpy())


def test_feed_forward_is_read_as_transformers_reads_it() -> None:
    """The name says activation and gate; newer files say both again, and then those count."""

    def ours(**given: Any) -> tuple[str, bool]:
        read = Config.from_hf({**TINY, **given})
        return read.dense_act_fn, read.is_gated_act

    for given in (
        {},
        {"feed_forward_proj": "gated-gelu"},
        {"feed_forward_proj": "gelu_new"},
        {"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True},
    ):
        theirs = T5Config.from_dict({**TINY, **given})
        assert ours(**given) == (theirs.dense_act_fn, theirs.is_gated_act)
    mt5 = MT5Config.from_dict(TINY)
    assert ours(model_type="mt5") == (mt5.dense_act_fn, mt5.is_gated_act)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"feed_forward_proj": "gated-fantasy"}, "activation is 'fantasy'"),
        ({"feed_forward_proj": "double-gated-gelu"}, "feed_forward_proj is 'double-gated-gelu'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"relative_attention_num_buckets": 3}, "relative_attention_num_buckets is 3"),
        ({"relative_attention_max_distance": 8}, "relative_attention_max_distance 8"),
    ],
)
def test_what_is_not_t5_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf({**TINY, **overrides})


@pytest.mark.parametrize("field", sorted(TINY))
def test_missing_field_is_named(field: str) -> None:
    """Sizes have no defaults here."""
    with pytest.raises(UnsupportedModelError, match=field):
        Config.from_hf({name: value for name, value in TINY.items() if name != field})
