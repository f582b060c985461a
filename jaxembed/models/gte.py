"""GTE, the encoder of mGTE (https://arxiv.org/abs/2407.19669): BERT with rotary positions and a gated feed-forward.

Reference: transformers' `GteModel` without its pooler. It also replaces the remote classes `NewModel` of
Alibaba-NLP/new-impl (model_type "new"; revision 40ced75c3017, as users pin it) and `GteModel` of Snowflake's copy,
which are the same computation under other names. Their static NTK scaling (`rope_scaling` of type "ntk") is read as
what it comes to: theta times the factor, and every angle divided by factor^(2 / H). The heads are those of
`GteForSequenceClassification` and `GteForMaskedLM`. Proven on random configurations, in all three forms.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture, Weight, Weights
from jaxembed.blocks import linear_weights, norm_weights
from jaxembed.configs import check_heads, read_fields
from jaxembed.errors import UnsupportedModelError
from jaxembed.gated import GatedLayer, GatedMLP, WordEmbeddings
from jaxembed.heads import classifier_head, masked_lm_head
from jaxembed.layers import activation
from jaxembed.rotary import Rotary, read_rotary
from jaxembed.tokens import Tokens

__all__ = ["ARCHITECTURE", "Config", "Gte"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of config.json that the encoder reads, with the defaults of Hugging Face's GteConfig."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    rotary: Rotary
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8192
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-12

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
        positions = config.get("position_embedding_type") or "rope"
        if positions != "rope":
            raise UnsupportedModelError(f"position_embedding_type is {positions!r}; supported: 'rope'")
        norm = config.get("layer_norm_type") or "layer_norm"
        if norm != "layer_norm":
            raise UnsupportedModelError(f"layer_norm_type is {norm!r}; supported: 'layer_norm'")
        if config.get("logn_attention_scale"):
            raise UnsupportedModelError("logn_attention_scale is true; only plain scaling of attention is supported")
        read = read_fields(cls, config, rotary=Rotary(()))
        check_heads(read.hidden_size, read.num_attention_heads)
        activation(read.hidden_act)
        return replace(read, rotary=read_angles(config, read.hidden_size // read.num_attention_heads))


def read_angles(config: Mapping[str, Any], head_dim: int) -> Rotary:
    """The rotary angles, static NTK scaling included.

    Raises:
        UnsupportedModelError: a kind that is not implemented.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    remote = config.get("model_type") == "new" or bool(config.get("auto_map"))
    theta = float(given.get("rope_theta") or config.get("rope_theta") or (10_000 if remote else 160_000))
    if (given.get("rope_type") or given.get("type")) != "ntk":
        return read_rotary(config, head_dim, default_theta=theta)
    factor = float(given.get("factor") or 0)
    if factor < 1 or given.get("mixed_b") is not None:
        raise UnsupportedModelError(
            f"rope_scaling of type 'ntk' has factor {given.get('factor')!r} and mixed_b {given.get('mixed_b')!r}; "
            "supported: a factor of at least 1, and no mixed_b"
        )
    linear = {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}
    return read_rotary({"rope_parameters": linear}, head_dim)


class Gte(nnx.Module):
    """The encoder.

    Args:
        config: sizes.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = WordEmbeddings(config.vocab_size, width, config.type_vocab_size, eps, dtype)
        mlp = (width, config.intermediate_size, config.hidden_act, dtype)
        self.layers = nnx.List(
            [
                GatedLayer(width, config.num_attention_heads, GatedMLP(*mlp, down_bias=True), eps, dtype)
                for _ in range(config.num_hidden_layers)
            ]
        )
        self.rotary = config.rotary

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings' output and each layer's after it, as Hugging Face's `output_hidden_states`."""
        turn = self.rotary.turn(tokens.rows.places)
        states = [self.embeddings(tokens)]
        for layer in self.layers:
            states.append(layer(states[-1], tokens.rows, turn=turn))
        return states


EMBEDDINGS: Weights = {
    "embeddings.word.table": Weight("embeddings.word_embeddings.weight"),
    "embeddings.token_type.table": Weight("embeddings.token_type_embeddings.weight"),
    **norm_weights("embeddings.norm", "embeddings.LayerNorm"),
}

WEIGHTS: Weights = {
    **EMBEDDINGS,
    **linear_weights("layers.{n}.query", "encoder.layer.{n}.attention.qkv_proj", part=(0, 3)),
    **linear_weights("layers.{n}.key", "encoder.layer.{n}.attention.qkv_proj", part=(1, 3)),
    **linear_weights("layers.{n}.value", "encoder.layer.{n}.attention.qkv_proj", part=(2, 3)),
    **linear_weights("layers.{n}.output", "encoder.layer.{n}.attention.o_proj"),
    **norm_weights("layers.{n}.attention_norm", "encoder.layer.{n}.attn_ln"),
    **linear_weights("layers.{n}.mlp.up", "encoder.layer.{n}.mlp.up_gate_proj", part=(0, 2)),
    **linear_weights("layers.{n}.mlp.gate", "encoder.layer.{n}.mlp.up_gate_proj", part=(1, 2)),
    **linear_weights("layers.{n}.mlp.down", "encoder.layer.{n}.mlp.down_proj"),
    **norm_weights("layers.{n}.output_norm", "encoder.layer.{n}.mlp_ln"),
}
"""The remote code's names, which transformers' port saves under too."""

UNPACKED: Weights = {
    **WEIGHTS,
    **linear_weights("layers.{n}.query", "encoder.layer.{n}.attention.q_proj"),
    **linear_weights("layers.{n}.key", "encoder.layer.{n}.attention.k_proj"),
    **linear_weights("layers.{n}.value", "encoder.layer.{n}.attention.v_proj"),
}
"""The remote code's, where `pack_qkv` is false."""

PORT: Weights = {
    **EMBEDDINGS,
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
"""The names inside transformers' port."""

IGNORED = (r"embeddings\.position_ids", r"pooler\..*", r"lm_head\..*", r"classifier\..*")

HEADS = {
    SEQUENCE_CLASSIFICATION: classifier_head("pooler.dense", "classifier"),
    FILL_MASK: masked_lm_head("lm_head.dense", "lm_head.norm", "lm_head.decoder", act=lambda config: "gelu"),
}

ARCHITECTURE = Architecture(
    model_type="gte",
    config=Config.from_hf,
    build=Gte,
    weights=WEIGHTS,
    alternatives=(UNPACKED, PORT),
    ignored=IGNORED,
    prefixes=("", "new.", "gte."),
    heads=HEADS,
)
