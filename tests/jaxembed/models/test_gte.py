"""GTE against transformers' GteModel, under its own names and under those of the hub's originals."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from originals import check_token_types, saver
from parity import SIZES, TINY, randomise, save_checkpoint, small_tokenizer
from transformers import GteConfig, GteForMaskedLM, GteModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.models import architecture
from jaxembed.models.gte import ARCHITECTURE, Config

ORIGINAL = SIZES | {
    "architectures": ["NewModel"],
    "auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"},
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "logn_attention_clip1": False,
    "logn_attention_scale": False,
    "model_type": "new",
    "pack_qkv": True,
    "position_embedding_type": "rope",
    "rope_scaling": None,
    "rope_theta": 500_000,
    "type_vocab_size": 0,
    "unpad_inputs": "true",
    "use_memory_efficient_attention": "true",
}
"""config.json of a hub original, in small."""


def tiny(**overrides: Any) -> GteModel:
    """Transformers' port."""
    return GteModel(GteConfig(**TINY | overrides))


def original_names(state: Mapping[str, torch.Tensor], prefix: str = "", packed: bool = True) -> dict[str, torch.Tensor]:
    """The port's weights under the remote code's names."""
    names = {"post_attention_layernorm": "attn_ln", "post_mlp_layernorm": "mlp_ln", "self_attn": "attention"}
    renamed = {}
    for name, array in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[f"encoder.layer.{name.removeprefix('layers.')}" if name.startswith("layers.") else name] = array
    fused = {"mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj")}
    if packed:
        fused["attention.qkv_proj"] = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
    for whole, parts in fused.items():
        for name in [name for name in renamed if f".{parts[0]}." in name]:
            arrays = [renamed.pop(name.replace(parts[0], part)) for part in parts]
            renamed[name.replace(parts[0], whole)] = torch.cat(arrays)
    return {prefix + name: array for name, array in renamed.items()}


def set_theta(model: GteModel, frequencies: torch.Tensor) -> GteModel:
    """Give the port other angles than its configuration does."""
    assert model.rotary_emb.inv_freq.shape == frequencies.shape
    model.rotary_emb.inv_freq = frequencies
    return model


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"type_vocab_size": 0, "hidden_act": "silu", "num_attention_heads": 4},
        {"type_vocab_size": 3, "hidden_act": "relu", "layer_norm_eps": 1e-2, "intermediate_size": 7},
        {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 4, "max_position_embeddings": 9},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "vocab_size": 101},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
    ],
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch."""
    parity(tiny(**overrides))


def test_parity_under_the_names_of_the_port(parity: Callable[..., None]) -> None:
    """Transformers can also save its own names."""

    def save(model: GteModel, folder: Path) -> Path:
        model.save_pretrained(folder, save_original_format=False)
        small_tokenizer().save_pretrained(folder)
        return folder

    parity(tiny(), save=save)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("prefix", ["", "new."])
def test_parity_with_an_original(prefix: str, packed: bool, parity: Callable[..., None]) -> None:
    """The remote code's names and fields, with queries, keys and values packed or not."""
    model = tiny(type_vocab_size=0, rope_parameters={"rope_type": "default", "rope_theta": 500_000.0})
    config = ORIGINAL | {"pack_qkv": packed}
    parity(model, save=saver(config, lambda state: original_names(state, prefix, packed)))


def test_parity_with_snowflakes_copy(parity: Callable[..., None]) -> None:
    """The same class under another name, and model_type "gte" with the fields of "new"."""
    auto_map = {"AutoModel": "modeling_hf_alibaba_nlp_gte.GteModel"}
    config = ORIGINAL | {"model_type": "gte", "auto_map": auto_map, "type_vocab_size": 1, "rope_theta": 160_000}
    parity(tiny(), save=saver(config, original_names))


@pytest.mark.parametrize(("theta", "factor"), [(500_000, 2.0), (20_000, 8.0), (100, 1.0)])
def test_parity_with_static_ntk_scaling(theta: int, factor: float, parity: Callable[..., None]) -> None:
    """The remote code's frequencies: 1 / (theta s)^(2i / H), divided by s^(2 / H)."""
    width = TINY["hidden_size"] // TINY["num_attention_heads"]
    frequencies = 1 / (theta * factor) ** (torch.arange(0, width, 2).float() / width) / factor ** (2 / width)
    config = ORIGINAL | {"rope_theta": theta, "rope_scaling": {"type": "ntk", "factor": factor}}
    parity(set_theta(tiny(type_vocab_size=0), frequencies), save=saver(config, original_names))


def test_an_encoder_inside_a_larger_model(parity: Callable[..., None]) -> None:
    """The prefix is found and the head is left over."""
    whole = GteForMaskedLM(GteConfig(**TINY))
    parity(whole.gte, save=lambda _, folder: save_checkpoint(whole, folder))


@pytest.mark.parametrize("types", [2, 1, 0])
def test_token_types(types: int, tmp_path: Path) -> None:
    """The second text of a pair has its own type, where the model has one for it."""
    model = randomise(tiny(type_vocab_size=types), 0)
    check_token_types(model, tmp_path, save_checkpoint, types=2 if types == 2 else 1)


def test_ntk_scaling_is_what_transformers_makes_of_it() -> None:
    """The hub's converted configurations say "linear", on a theta times the factor: the same angles."""
    old = {"rope_theta": 20_000, "rope_scaling": {"type": "ntk", "factor": 8.0}}
    new = {"rope_parameters": {"rope_type": "linear", "rope_theta": 160_000.0, "factor": 8.0 ** (2 / 8)}}
    saved = {"rope_parameters": {"rope_type": "ntk", "rope_theta": 20_000, "factor": 8.0}}
    assert Config.from_hf(SIZES | old) == Config.from_hf(SIZES | new) == Config.from_hf(SIZES | saved)


def test_thetas_that_no_file_says() -> None:
    """The remote code's own default is not the port's."""
    thetas = [Config.from_hf(SIZES | kind).rotary.frequencies[1] ** -4 for kind in ({}, {"model_type": "new"})]
    assert thetas == pytest.approx([160_000, 10_000])


@pytest.mark.parametrize("remote", ["Alibaba-NLP/new-impl--modeling.NewModel", "modeling_hf_alibaba_nlp_gte.GteModel"])
def test_remote_classes_are_replaced(remote: str) -> None:
    """Both names of the remote class lead here."""
    assert architecture({"model_type": "new", "auto_map": {"AutoModel": remote}}) is ARCHITECTURE


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'"),
        ({"layer_norm_type": "rms_norm"}, "layer_norm_type is 'rms_norm'"),
        ({"logn_attention_scale": True}, "logn_attention_scale"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0, "mixed_b": 0.625}}, "mixed_b 0.625"),
        ({"rope_scaling": {"type": "ntk", "factor": 0.5}}, "factor 0.5"),
        ({"rope_scaling": {"type": "ntk"}}, "factor None"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
        ({"hidden_act": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
    ],
)
def test_what_is_not_supported_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf(ORIGINAL | overrides)


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
)
def test_missing_field_is_named(field: str) -> None:
    """Sizes have no defaults here: a file without one is refused by name."""
    with pytest.raises(UnsupportedModelError, match=field):
        Config.from_hf({name: value for name, value in SIZES.items() if name != field})
