"""Nomic Embed (https://arxiv.org/abs/2402.01613) and its mixture of experts (https://arxiv.org/abs/2502.07972): BERT
with rotary positions, and with a gated feed-forward or with experts.

Reference: transformers' `NomicBertModel`, and the remote class of that name of nomic-ai/nomic-bert-2048 (revision
7710840340a0, as users pin it), which it replaces, with its own configuration (`n_embd`, `rotary_emb_base`, ...). A
config.json may hold both, as the hub's do today: they must agree, and the remote code's, which says more, is read.
Proven on random configurations.

`rotary_scaling_factor` s slows the angles of texts longer than `max_trained_positions` M: theta is multiplied by (s T /
M - s + 1)^(R / (R - 2)). The remote code takes the length of the padded batch for T, and keeps the longest it has met;
here T is the length of each text, as there for a text alone in a fresh model. Where it is null the angles are the same
at every length.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxembed.architecture import Architecture, Weight, Weights
from jaxembed.blocks import linear_weights, norm_weights
from jaxembed.configs import check_heads, read_fields
from jaxembed.errors import UnsupportedModelError
from jaxembed.gated import GatedLayer, GatedMLP, WordEmbeddings
from jaxembed.layers import Linear, activation, matmul, parameter
from jaxembed.rotary import Rotary, Turn, read_rotary
from jaxembed.tokens import Rows, Tokens

__all__ = ["ARCHITECTURE", "Config", "NomicBert"]

THETA = 1000.0
"""The port's, where config.json gives none."""

GATED = {"swiglu": "silu", "geglu": "gelu", "glu": "sigmoid"}
"""The remote code's `activation_function` -> the activation of the gate."""

REFUSED = (
    "causal",
    "expert_choice_router",
    "moe_normalize_expert_weights",
    "norm_mlp",
    "num_shared_experts",
    "parallel_block",
    "prenorm",
    "rotary_emb_scale_base",
    "rotary_head_dim",
    "use_rms_norm",
)
"""Switches of the remote code that the published checkpoints leave off."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What both forms of config.json say, under the port's names or, where it has none, under the remote code's.

    Attributes:
        rotary: the angles of texts up to `max_trained_positions`.
        gated: has the feed-forward a gate?
        rotary_scaling_factor: 0 for none.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    rotary: Rotary
    gated: bool = True
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    qkv_proj_bias: bool = False
    mlp_fc1_bias: bool = False
    mlp_fc2_bias: bool = False
    rotary_scaling_factor: float = 0.0
    max_trained_positions: int = 2048
    num_experts: int | None = None
    moe_top_k: int | None = None
    moe_every_n_layers: int | None = None

    @property
    def max_length(self) -> int:
        """Tokens that the model was made for."""
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read config.json, of transformers' port or of the remote code.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        if "n_embd" in config:
            return read_original(config)
        read = read_fields(cls, config, rotary=Rotary(()))
        if read.head_dim is None:
            check_heads(read.hidden_size, read.num_attention_heads)
        activation(read.hidden_act)
        head_dim = read.head_dim or read.hidden_size // read.num_attention_heads
        return replace(read, rotary=read_rotary(config, head_dim, default_theta=THETA))


def read_original(config: Mapping[str, Any]) -> Config:
    """Read the remote code's configuration, with its defaults.

    Raises:
        UnsupportedModelError: a field is missing, asks for another kind of model, or contradicts the port's.
    """
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    names |= {"intermediate_size": "n_inner", "vocab_size": "vocab_size"}
    if missing := [name for name in names.values() if config.get(name) is None]:
        raise UnsupportedModelError(f"config.json does not say {', '.join(missing)}")
    given: dict[str, Any] = {name: config[old] for name, old in names.items()}
    width, heads = given["hidden_size"], given["num_attention_heads"]
    check_heads(width, heads)
    for name in REFUSED:
        if config.get(name):
            raise UnsupportedModelError(f"{name} is {config[name]!r}; supported: only where it is off")
    if config.get("num_heads_kv") not in (None, heads):
        raise UnsupportedModelError(
            f"num_heads_kv is {config['num_heads_kv']!r}; supported: as many as n_head, {heads}"
        )
    kind, experts = config.get("activation_function"), bool(config.get("moe_every_n_layers"))
    if kind not in (("gelu",) if experts else (*GATED, "gelu")) or (experts and config.get("ffn_div") not in (None, 1)):
        raise UnsupportedModelError(
            f"activation_function is {kind!r} and ffn_div {config.get('ffn_div')!r}; supported: {', '.join(GATED)} or, "
            "with experts or without, gelu and no ffn_div"
        )
    # The remote code rounds both up.
    given["vocab_size"] += -given["vocab_size"] % (config.get("pad_vocab_size_multiple") or 1)
    given["intermediate_size"] += -given["intermediate_size"] % 256 if kind in GATED else 0
    positions = config.get("n_positions", 1024)
    read = read_fields(
        Config,
        {"qkv_proj_bias": True, "mlp_fc1_bias": True, "mlp_fc2_bias": True, **config},
        **given,
        head_dim=width // heads,
        hidden_act=GATED.get(kind, kind),
        gated=kind in GATED,
        max_position_embeddings=positions if positions > 0 else 2048,
        layer_norm_eps=config.get("layer_norm_epsilon", 1e-5),
        rotary=read_original_angles(config, width // heads),
        rotary_scaling_factor=float(config.get("rotary_scaling_factor") or 0),
    )
    check_agreement(read, config)
    return read


def read_original_angles(config: Mapping[str, Any], head_dim: int) -> Rotary:
    """The remote code's rotary angles.

    Raises:
        UnsupportedModelError: a share of the features, or a scaling of the angles, that cannot be.
    """
    share, factor = config.get("rotary_emb_fraction", 0.0), config.get("rotary_scaling_factor") or 0
    width = head_dim * share
    if not 0 < width <= head_dim or width % 2 or factor < 0 or (factor and width == 2):
        raise UnsupportedModelError(
            f"rotary_emb_fraction is {share!r}, {width:g} of {head_dim} features, and rotary_scaling_factor is "
            f"{factor!r}; supported: an even number of features, and at least 4 where the factor is positive"
        )
    plain = {"rope_theta": config.get("rotary_emb_base", 10_000), "partial_rotary_factor": share}
    return read_rotary(plain, head_dim, interleaved=bool(config.get("rotary_emb_interleaved")))


def check_agreement(read: Config, config: Mapping[str, Any]) -> None:
    """Where the port's fields stand beside the remote code's, they must say the same.

    Raises:
        UnsupportedModelError: they do not.
    """
    # The remote code's limit is the higher one, and it rounds the vocabulary up.
    for name in {field.name for field in fields(read)} - {"max_position_embeddings", "vocab_size"}:
        said, meant = config.get(name), getattr(read, name)
        if said is not None and said != meant:
            raise UnsupportedModelError(f"config.json says {name} {said!r}, and by older names {meant!r}")
    if config.get("rope_parameters"):
        angles = read_rotary(config, read.head_dim or 0, default_theta=THETA, interleaved=read.rotary.interleaved)
        if angles != read.rotary:
            raise UnsupportedModelError("config.json says other angles in rope_parameters than by older names")


class Plain(nnx.Module):
    """A feed-forward without a gate, as between experts: fc2(act(fc1(x)))."""

    def __init__(self, config: Config, dtype: str) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.fc1 = Linear((width, inner), ("embed", "mlp"), dtype, bias=config.mlp_fc1_bias)
        self.fc2 = Linear((inner, width), ("mlp", "embed"), dtype, bias=config.mlp_fc2_bias)
        self.act = config.hidden_act

    def __call__(self, x: Float[Array, "L M D"]) -> Float[Array, "L M D"]:
        return self.fc2(self.fc1(x, self.act))


class Experts(nnx.Module):
    """The sum of a few feed-forwards, each times its part of the router's softmax over all, and one bias.

    Every expert computes every token, so that no shape depends on the router's choice.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        if not config.num_experts or not config.moe_top_k or config.moe_top_k > config.num_experts:
            raise UnsupportedModelError(f"num_experts is {config.num_experts!r} and moe_top_k {config.moe_top_k!r}")
        width, rows = config.hidden_size, config.num_experts * config.intermediate_size
        # float32 always: rounding would send tokens near a tie to other experts.
        self.router = Linear((width, config.num_experts), ("embed", "label"), "float32", bias=False)
        # One expert's rows after another's.
        self.w1 = parameter((rows, width), ("mlp", "embed"), dtype)
        self.w2 = parameter((rows, width), ("mlp", "embed"), dtype)
        self.bias = parameter((width,), ("embed",))
        self.activation = activation(config.hidden_act)
        self.experts = config.num_experts
        self.chosen = config.moe_top_k

    def __call__(self, x: Float[Array, "L M D"]) -> Float[Array, "L M D"]:
        parts, chosen = jax.lax.top_k(jax.nn.softmax(self.router(x), axis=-1), self.chosen)
        total = jnp.zeros_like(x)
        for n, (w1, w2) in enumerate(zip(*(jnp.split(w[...], self.experts) for w in (self.w1, self.w2)), strict=True)):
            inner = self.activation(matmul("BTD,FD->BTF", x, w1, w1.dtype))
            part = jnp.sum(jnp.where(chosen == n, parts, 0.0), axis=-1, keepdims=True)
            total = total + part * matmul("BTF,FD->BTD", inner, w2, w2.dtype)
        return total + self.bias[...][None, None]


def feed_forward(config: Config, n: int, dtype: str) -> GatedMLP | Plain | Experts:
    """That of layer n."""
    if config.moe_every_n_layers and n % config.moe_every_n_layers == 1:
        return Experts(config, dtype)
    if not config.gated:
        return Plain(config, dtype)
    sizes = (config.hidden_size, config.intermediate_size)
    return GatedMLP(*sizes, config.hidden_act, dtype, bias=config.mlp_fc1_bias, down_bias=config.mlp_fc2_bias)


class NomicBert(nnx.Module):
    """The encoder.

    Args:
        config: sizes.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
        self.embeddings = WordEmbeddings(config.vocab_size, width, config.type_vocab_size, eps, dtype)
        self.layers = nnx.List(
            [
                GatedLayer(
                    width,
                    heads,
                    feed_forward(config, n, dtype),
                    eps,
                    dtype,
                    head_dim=config.head_dim,
                    bias=config.qkv_proj_bias,
                )
                for n in range(config.num_hidden_layers)
            ]
        )
        self.rotary = config.rotary
        self.scaling = config.rotary_scaling_factor
        self.trained = config.max_trained_positions

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings' output and each layer's after it, as Hugging Face's `output_hidden_states`."""
        turn = self.turn(tokens.rows)
        states = [self.embeddings(tokens)]
        for layer in self.layers:
            states.append(layer(states[-1], tokens.rows, turn=turn))
        return states

    def turn(self, rows: Rows) -> Turn:
        """By the angles of the places, or of the places in each row where they depend on its length."""
        pairs = len(self.rotary.frequencies)
        if not self.scaling or rows.length <= self.trained:
            return self.rotary.turn(rows.places)
        lengths = jnp.maximum(jnp.sum(rows.mask, axis=1, dtype=jnp.int32), self.trained).astype(jnp.float32)
        grown = self.scaling * lengths / self.trained - (self.scaling - 1)
        # theta^(-2i / R), of a theta that is grown^(R / (R - 2)) times as large.
        exponents = -jnp.arange(pairs, dtype=jnp.float32) / (pairs - 1)
        return self.rotary.turn(rows.places, rows.each(grown)[:, :, None] ** exponents[None, None])


WEIGHTS: Weights = {
    "embeddings.word.table": Weight("embeddings.word_embeddings.weight"),
    "embeddings.token_type.table": Weight("embeddings.token_type_embeddings.weight"),
    **norm_weights("embeddings.norm", "emb_ln"),
    **linear_weights("layers.{n}.query", "encoder.layers.{n}.attn.Wqkv", part=(0, 3)),
    **linear_weights("layers.{n}.key", "encoder.layers.{n}.attn.Wqkv", part=(1, 3)),
    **linear_weights("layers.{n}.value", "encoder.layers.{n}.attn.Wqkv", part=(2, 3)),
    **linear_weights("layers.{n}.output", "encoder.layers.{n}.attn.out_proj"),
    **norm_weights("layers.{n}.attention_norm", "encoder.layers.{n}.norm1"),
    **linear_weights("layers.{n}.mlp.up", "encoder.layers.{n}.mlp.fc11"),
    **linear_weights("layers.{n}.mlp.gate", "encoder.layers.{n}.mlp.fc12"),
    **linear_weights("layers.{n}.mlp.down", "encoder.layers.{n}.mlp.fc2"),
    **linear_weights("layers.{n}.mlp.fc1", "encoder.layers.{n}.mlp.fc1"),
    **linear_weights("layers.{n}.mlp.fc2", "encoder.layers.{n}.mlp.fc2"),
    **linear_weights("layers.{n}.mlp.router", "encoder.layers.{n}.mlp.router.layer"),
    "layers.{n}.mlp.w1": Weight("encoder.layers.{n}.mlp.experts.mlp.w1"),
    "layers.{n}.mlp.w2": Weight("encoder.layers.{n}.mlp.experts.mlp.w2"),
    "layers.{n}.mlp.bias": Weight("encoder.layers.{n}.mlp.experts.bias"),
    **norm_weights("layers.{n}.output_norm", "encoder.layers.{n}.norm2"),
}
"""The remote code's names, which transformers' port saves under too."""

PORT: Weights = {
    **WEIGHTS,
    **norm_weights("embeddings.norm", "embeddings.LayerNorm"),
    **linear_weights("layers.{n}.query", "layers.{n}.self_attn.q_proj"),
    **linear_weights("layers.{n}.key", "layers.{n}.self_attn.k_proj"),
    **linear_weights("layers.{n}.value", "layers.{n}.self_attn.v_proj"),
    **linear_weights("layers.{n}.output", "layers.{n}.self_attn.o_proj"),
    **norm_weights("layers.{n}.attention_norm", "layers.{n}.post_attention_layernorm"),
    **linear_weights("layers.{n}.mlp.up", "layers.{n}.mlp.up_proj"),
    **linear_weights("layers.{n}.mlp.gate", "layers.{n}.mlp.gate_proj"),
    **linear_weights("layers.{n}.mlp.down", "layers.{n}.mlp.down_proj"),
    **norm_weights("layers.{n}.output_norm", "layers.{n}.post_mlp_layernorm"),
}
"""The names inside transformers' port, which has no experts."""

IGNORED = (r"embeddings\.position_ids", r"pooler\..*", r"cls\..*", r"classifier\..*")

ARCHITECTURE = Architecture(
    model_type="nomic_bert",
    config=Config.from_hf,
    build=NomicBert,
    weights=WEIGHTS,
    alternatives=(PORT,),
    ignored=IGNORED,
    prefixes=("", "bert.", "nomic_bert."),
)
