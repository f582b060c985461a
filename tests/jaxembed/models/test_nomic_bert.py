"""Nomic Embed against transformers' NomicBertModel, and in its remote code's form against a torch module of our own."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from originals import check_token_types, encoded, saver
from parity import SIZES, TINY, randomise, save_checkpoint, small_tokenizer
from torch import nn
from torch.nn import functional
from transformers import NomicBertConfig, NomicBertForMaskedLM, NomicBertModel

from jaxembed.errors import UnsupportedModelError
from jaxembed.loading import load
from jaxembed.models import architecture
from jaxembed.models.nomic_bert import ARCHITECTURE, Config
from jaxembed.sharding import make_mesh
from jaxembed.tokens import Tokens

ORIGINAL: dict[str, Any] = {
    "activation_function": "swiglu",
    "architectures": ["NomicBertModel"],
    "auto_map": {"AutoModel": "nomic-ai/nomic-bert-2048--modeling_hf_nomic_bert.NomicBertModel"},
    "causal": False,
    "layer_norm_epsilon": 1e-12,
    "max_trained_positions": 2048,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "model_type": "nomic_bert",
    "n_embd": 16,
    "n_head": 2,
    "n_inner": 256,
    "n_layer": 2,
    "n_positions": 32,
    "pad_vocab_size_multiple": 64,
    "parallel_block": False,
    "prenorm": False,
    "qkv_proj_bias": False,
    "rotary_emb_base": 1000,
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,
    "type_vocab_size": 2,
    "use_rms_norm": False,
    "vocab_size": 64,
}
"""config.json of a hub original, in small."""

EXPERTS: dict[str, Any] = {
    "activation_function": "gelu",
    "expert_choice_router": False,
    "ffn_div": 1,
    "mlp_fc1_bias": True,
    "mlp_fc2_bias": True,
    "moe_every_n_layers": 2,
    "moe_normalize_expert_weights": False,
    "moe_top_k": 2,
    "n_inner": 24,
    "n_layer": 3,
    "num_experts": 4,
    "num_shared_experts": 0,
    "qkv_proj_bias": True,
    "rotary_emb_base": 10_000,
    "type_vocab_size": 1,
}
"""What the mixture of experts says otherwise."""

ACTIVATIONS = {"swiglu": functional.silu, "geglu": functional.gelu, "glu": torch.sigmoid, "gelu": functional.gelu}


class OriginalNomicBert(nn.Module):
    """What the remote code computes, text by text and without padding, under its names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)  # torch begins biases at random; `randomise` adds to them
        self.told = SimpleNamespace(**config)
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(self.told.vocab_size, self.told.n_embd)
        if self.told.type_vocab_size:
            self.embeddings.token_type_embeddings = nn.Embedding(self.told.type_vocab_size, self.told.n_embd)
        self.emb_ln = self.norm()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList([self.layer(n) for n in range(self.told.n_layer)])

    def norm(self) -> nn.LayerNorm:
        """One of the norms."""
        return nn.LayerNorm(self.told.n_embd, eps=self.told.layer_norm_epsilon)

    def layer(self, n: int) -> nn.Module:
        """The parameters of layer n."""
        told, layer = self.told, nn.Module()
        width, inner = told.n_embd, told.n_inner
        layer.attn = nn.Module()
        layer.attn.Wqkv = nn.Linear(width, 3 * width, bias=told.qkv_proj_bias)
        layer.attn.out_proj = nn.Linear(width, width, bias=told.qkv_proj_bias)
        layer.norm1, layer.norm2, layer.mlp = self.norm(), self.norm(), nn.Module()
        if getattr(told, "moe_every_n_layers", 0) and n % told.moe_every_n_layers == 1:
            layer.mlp.router = nn.Module()
            layer.mlp.router.layer = nn.Linear(width, told.num_experts, bias=False)
            layer.mlp.experts = nn.Module()
            layer.mlp.experts.mlp = nn.Module()
            layer.mlp.experts.mlp.w1 = nn.Parameter(torch.zeros(told.num_experts * inner, width))
            layer.mlp.experts.mlp.w2 = nn.Parameter(torch.zeros(told.num_experts * inner, width))
            layer.mlp.experts.bias = nn.Parameter(torch.zeros(width))
            return layer
        gated = told.activation_function != "gelu"
        inner = math.ceil(inner / 256) * 256 if gated else inner
        for name in ("fc11", "fc12") if gated else ("fc1",):
            setattr(layer.mlp, name, nn.Linear(width, inner, bias=told.mlp_fc1_bias))
        layer.mlp.fc2 = nn.Linear(inner, width, bias=told.mlp_fc2_bias)
        return layer

    def feed_forward(self, mlp: Any, x: torch.Tensor) -> torch.Tensor:
        """Gated, plain, or each token by the experts that the router chose for it."""
        act = ACTIVATIONS[self.told.activation_function]
        if hasattr(mlp, "fc12"):
            return mlp.fc2(mlp.fc11(x) * act(mlp.fc12(x)))
        if hasattr(mlp, "fc1"):
            return mlp.fc2(act(mlp.fc1(x)))
        parts = mlp.router.layer(x).softmax(-1)
        shape = (self.told.num_experts, self.told.n_inner, self.told.n_embd)
        w1, w2 = mlp.experts.mlp.w1.view(shape), mlp.experts.mlp.w2.view(shape)
        rows = []
        for token, weights in zip(x, parts, strict=True):
            best = weights.argsort(descending=True)[: self.told.moe_top_k]
            rows.append(sum(weights[e] * (act(w1[e] @ token) @ w2[e]) for e in best))
        return torch.stack(rows) + mlp.experts.bias

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary positions of [T, N, H], as multiplication of complex numbers."""
        told, length = self.told, len(x)
        width = int(x.shape[-1] * told.rotary_emb_fraction)
        base, trained = told.rotary_emb_base, told.max_trained_positions
        if told.rotary_scaling_factor and length > trained:
            grown = told.rotary_scaling_factor * length / trained - (told.rotary_scaling_factor - 1)
            base = base * grown ** (width / (width - 2))
        angles = torch.arange(length)[:, None] * base ** -(torch.arange(0, width, 2) / width)
        turned = x[..., :width]
        if told.rotary_emb_interleaved:
            pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
        else:
            pairs = torch.complex(turned[..., : width // 2], turned[..., width // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
        if told.rotary_emb_interleaved:
            turned = torch.view_as_real(pairs).flatten(-2)
        else:
            turned = torch.cat([pairs.real, pairs.imag], -1)
        return torch.cat([turned, x[..., width:]], -1)

    def text(self, ids: torch.Tensor, types: torch.Tensor) -> list[torch.Tensor]:
        """Hidden states of one text: [T, D] each."""
        x = self.embeddings.word_embeddings(ids)
        if self.told.type_vocab_size:
            x = x + self.embeddings.token_type_embeddings(types)
        states = [self.emb_ln(x)]
        for layer in self.encoder.layers:
            x = states[-1]
            q, k, v = layer.attn.Wqkv(x).view(len(x), 3, self.told.n_head, -1).unbind(1)
            scores = torch.einsum("qnh,knh->nqk", self.turn(q), self.turn(k)) / q.shape[-1] ** 0.5
            mixed = torch.einsum("nqk,knh->qnh", scores.softmax(-1), v).flatten(1)
            x = layer.norm1(x + layer.attn.out_proj(mixed))
            states.append(layer.norm2(x + self.feed_forward(layer.mlp, x)))
        return states

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool = True,
    ) -> SimpleNamespace:
        """Hidden states of texts, zero in the padding."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        lengths = attention_mask.sum(1).tolist()
        texts = [self.text(ids[:n], kinds[:n]) for ids, kinds, n in zip(input_ids, types, lengths, strict=True)]
        states = [nn.utils.rnn.pad_sequence(list(state), batch_first=True) for state in zip(*texts, strict=True)]
        missing = input_ids.shape[1] - states[0].shape[1]
        return encoded([functional.pad(state, (0, 0, 0, missing)) for state in states])


def tiny(**overrides: Any) -> NomicBertModel:
    """Transformers' port."""
    return NomicBertModel(NomicBertConfig(**TINY | overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"hidden_act": "gelu", "num_attention_heads": 4, "type_vocab_size": 1},
        {"hidden_act": "relu", "head_dim": 6, "layer_norm_eps": 1e-2, "type_vocab_size": 3},
        {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 4, "max_position_embeddings": 9},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}, "vocab_size": 101, "intermediate_size": 7},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
    ],
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch."""
    parity(tiny(**overrides))


def test_parity_under_the_names_of_the_port(parity: Callable[..., None]) -> None:
    """Transformers can also save its own names."""

    def save(model: NomicBertModel, folder: Path) -> Path:
        model.save_pretrained(folder, save_original_format=False)
        small_tokenizer().save_pretrained(folder)
        return folder

    parity(tiny(), save=save)


def original_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The port's weights under the remote code's names."""
    names = {
        "embeddings.LayerNorm": "emb_ln",
        "self_attn.o_proj": "attn.out_proj",
        "mlp.up_proj": "mlp.fc11",
        "mlp.gate_proj": "mlp.fc12",
        "mlp.down_proj": "mlp.fc2",
        "post_attention_layernorm": "norm1",
        "post_mlp_layernorm": "norm2",
    }
    renamed = {}
    for name, array in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[f"encoder.{name}" if name.startswith("layers.") else name] = array
    for name in [name for name in renamed if "q_proj" in name]:
        parts = [renamed.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj")]
        renamed[name.replace("self_attn.q_proj", "attn.Wqkv")] = torch.cat(parts)
    return renamed


@pytest.mark.parametrize("both", [False, True])
def test_parity_of_an_original_with_the_port(both: bool, parity: Callable[..., None]) -> None:
    """The remote code's names and fields, alone or beside the port's fields as on the hub today, with a lower limit."""
    model = tiny(intermediate_size=256)
    rope = {"rope_theta": 1000.0, "rope_type": "default"}
    beside = SIZES | {"max_position_embeddings": 8, "intermediate_size": 256, "rope_parameters": rope}
    config = ORIGINAL | (beside if both else {})
    parity(model, save=saver(config, original_names))
    assert Config.from_hf(config).max_length == ORIGINAL["n_positions"]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"activation_function": "geglu", "n_inner": 100, "mlp_fc2_bias": True, "type_vocab_size": 0},
        {"activation_function": "glu", "qkv_proj_bias": True, "mlp_fc1_bias": True, "layer_norm_epsilon": 1e-2},
        {"activation_function": "gelu", "n_inner": 100, "mlp_fc1_bias": True, "vocab_size": 128},
        {"rotary_emb_interleaved": True, "n_head": 4, "rotary_emb_base": 100},
        {"rotary_emb_fraction": 0.5, "n_layer": 3},
        {"rotary_emb_fraction": 0.25, "rotary_emb_interleaved": True},
        {"rotary_scaling_factor": 2, "max_trained_positions": 8},
        {"rotary_scaling_factor": 0.5, "max_trained_positions": 20, "rotary_emb_fraction": 0.5},
        {"rotary_scaling_factor": 3.0, "max_trained_positions": 16, "rotary_emb_interleaved": True},
        {"rotary_scaling_factor": 2.0, "max_trained_positions": 32},
        EXPERTS,
        EXPERTS | {"moe_top_k": 1, "num_experts": 3, "moe_every_n_layers": 3, "n_layer": 5},
    ],
)
def test_parity_of_an_original(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """What the port has no switch for: biases, feed-forwards, shares of features, scaled angles, experts."""
    config = ORIGINAL | overrides
    parity(OriginalNomicBert(config), save=saver(config))


def test_the_reference_agrees_with_the_port(parity: Callable[..., None]) -> None:
    """The module that stands for the remote code computes what transformers' port computes, where that can."""
    port = randomise(tiny(intermediate_size=256), 0)
    original = OriginalNomicBert(ORIGINAL).eval()
    original.load_state_dict(original_names(port.state_dict()))
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        difference = original(ids, mask).last_hidden_state - port(ids, mask).last_hidden_state
    assert difference.abs().max() < 1e-5


@pytest.mark.parametrize("prefix", ["bert.", "nomic_bert."])
def test_an_original_inside_a_larger_model(prefix: str, parity: Callable[..., None]) -> None:
    """The prefix is found and the head is left over."""

    def names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {prefix + name: array for name, array in state.items()} | {"cls.predictions.bias": torch.zeros(64)}

    parity(OriginalNomicBert(ORIGINAL), save=saver(ORIGINAL, names))


def test_the_port_inside_a_larger_model(parity: Callable[..., None]) -> None:
    """As transformers saves its masked language model."""
    whole = NomicBertForMaskedLM(NomicBertConfig(**TINY))
    parity(whole.nomic_bert, save=lambda _, folder: save_checkpoint(whole, folder))


@pytest.mark.parametrize("types", [2, 1, 0])
def test_token_types(types: int, tmp_path: Path) -> None:
    """The second text of a pair has its own type, where the model has one for it."""
    config = ORIGINAL | {"type_vocab_size": types}
    check_token_types(randomise(OriginalNomicBert(config), 0), tmp_path, saver(config), types=2 if types == 2 else 1)


@pytest.mark.parametrize(
    "overrides", [EXPERTS, {"rotary_scaling_factor": 2, "max_trained_positions": 8}], ids=["experts", "scaled"]
)
def test_on_several_devices(overrides: dict[str, Any], tmp_path: Path) -> None:
    """Experts and rows that turn by themselves are the same where the model is cut in two."""
    config = ORIGINAL | overrides
    folder = saver(config)(randomise(OriginalNomicBert(config), 0), tmp_path)
    ids = np.random.default_rng(0).integers(0, 64, (4, 16), np.int32)
    mask = np.arange(16)[None, :] < np.array([16, 0, 9, 3])[:, None]
    results = []
    for mesh in (make_mesh(jax.devices()[:1]), make_mesh(jax.devices()[:4], model_parallel=2)):
        model = load(folder, mesh=mesh)
        run = jax.jit(lambda leaves, tokens, model=model: model.encoder(leaves).hidden_states(tokens)[-1])
        results.append(np.asarray(run(model.leaves, Tokens.plain(jnp.array(ids), jnp.array(mask)))))
    assert np.isfinite(results[0]).all()
    assert np.abs(results[0] - results[1]).max() < 1e-5


def test_defaults() -> None:
    """What the file leaves out is as in Hugging Face's NomicBertConfig, or as in the remote code's own."""
    read = Config.from_hf(SIZES)
    assert (read.hidden_act, read.type_vocab_size, read.layer_norm_eps) == ("silu", 2, 1e-12)
    assert read.rotary.frequencies[1] ** -4 == pytest.approx(1000)
    given = ("activation_function", "n_embd", "n_head", "n_inner", "n_layer", "rotary_emb_fraction", "vocab_size")
    read = Config.from_hf({name: ORIGINAL[name] for name in given})
    assert (read.qkv_proj_bias, read.mlp_fc1_bias, read.mlp_fc2_bias) == (True, True, True)
    assert (read.layer_norm_eps, read.max_length, read.max_trained_positions) == (1e-5, 1024, 2048)
    assert read.rotary.frequencies[1] ** -4 == pytest.approx(10_000)
    assert Config.from_hf(ORIGINAL | {"n_positions": 0}).max_length == 2048


def test_the_remote_code_rounds_up() -> None:
    """The vocabulary to `pad_vocab_size_multiple`, and the inner size of a gated feed-forward to 256."""
    read = Config.from_hf(ORIGINAL | {"vocab_size": 65, "n_inner": 257})
    assert (read.vocab_size, read.intermediate_size) == (128, 512)


def test_remote_class_is_replaced() -> None:
    """The hub's `auto_map` leads here."""
    assert architecture(ORIGINAL) is ARCHITECTURE


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"prenorm": True}, "prenorm is True"),
        ({"causal": True}, "causal is True"),
        ({"parallel_block": True}, "parallel_block is True"),
        ({"use_rms_norm": True}, "use_rms_norm is True"),
        ({"rotary_emb_scale_base": 512}, "rotary_emb_scale_base is 512"),
        ({"num_heads_kv": 1}, "num_heads_kv is 1"),
        ({"rotary_emb_fraction": 0.0}, "rotary_emb_fraction is 0.0"),
        ({"rotary_emb_fraction": 0.3}, r"rotary_emb_fraction is 0.3, 2.4 of 8"),
        ({"rotary_emb_fraction": 0.25, "rotary_scaling_factor": 2}, "rotary_scaling_factor is 2"),
        ({"rotary_scaling_factor": -1}, "rotary_scaling_factor is -1"),
        ({"activation_function": "gelu_new"}, "activation_function is 'gelu_new'"),
        ({"n_head": 3}, "16 does not divide into 3 heads"),
        ({"hidden_size": 32}, "hidden_size 32, and by older names 16"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "other angles in rope_parameters"),
        (EXPERTS | {"num_shared_experts": 1}, "num_shared_experts is 1"),
        (EXPERTS | {"moe_normalize_expert_weights": True}, "moe_normalize_expert_weights is True"),
        (EXPERTS | {"ffn_div": 2}, "ffn_div 2"),
        (EXPERTS | {"activation_function": "swiglu"}, "activation_function is 'swiglu'"),
    ],
)
def test_what_is_not_supported_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf(ORIGINAL | overrides)


def test_experts_without_numbers_are_refused(tmp_path: Path) -> None:
    """How many there are, and how many count, must be said."""
    config = {name: value for name, value in (ORIGINAL | EXPERTS).items() if name != "num_experts"}
    with pytest.raises(UnsupportedModelError, match="num_experts is None and moe_top_k 2"):
        load(saver(config)(nn.Linear(1, 1), tmp_path))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_act": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
    ],
)
def test_what_the_port_may_ask_in_vain(overrides: dict[str, Any], message: str) -> None:
    """The same of its configuration."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf(SIZES | overrides)


@pytest.mark.parametrize("field", ["n_embd", "n_head", "n_inner", "n_layer", "vocab_size"])
def test_missing_field_of_an_original_is_named(field: str) -> None:
    """Sizes have no defaults here: a file without one is refused by name; without n_embd it is the port's."""
    message = "hidden_size" if field == "n_embd" else field
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf({name: value for name, value in ORIGINAL.items() if name != field})
