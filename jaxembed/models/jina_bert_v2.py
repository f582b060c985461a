"""Jina Embeddings 2 (https://arxiv.org/abs/2310.19923): BERT whose places are told by ALiBi, mostly with a gated
feed-forward.

Reference: the remote class `JinaBertModel`, which it replaces, of jinaai/jina-bert-implementation (revision
f3ec4cf7de7e, as users pin it); and its variant jinaai/jina-bert-v2-qk-post-norm, which normalises queries and keys over
all heads, and the attention's result twice. transformers has neither. ALiBi (https://arxiv.org/abs/2108.12409) is
symmetric here: a slope of each head's own, times the distance of query and key, is taken off the score. Proven on
random configurations, against a torch module of the tests that computes what that code does.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxembed.architecture import Architecture, Weight, Weights
from jaxembed.attention import attention
from jaxembed.blocks import BertConfig, PostNormLayer, bert_layer_weights, linear_weights, norm_weights
from jaxembed.configs import check_heads, read_fields
from jaxembed.errors import UnsupportedModelError
from jaxembed.gated import GatedLayer, GatedMLP, WordEmbeddings
from jaxembed.layers import LayerNorm, activation, linear_norm, linears
from jaxembed.rotary import Turn
from jaxembed.tokens import Rows, Tokens

__all__ = ["ARCHITECTURE", "Config", "JinaBert"]

PLAIN, QK_NORM = "jinaai/jina-bert-implementation", "jinaai/jina-bert-v2-qk-post-norm"
"""The repositories of the remote code."""

GATED = {"geglu": "gelu", "reglu": "relu"}
"""`feed_forward_type` -> the activation of the gate; `hidden_act` is that of the type "original" alone."""


@dataclass(frozen=True, kw_only=True)
class Config(BertConfig):
    """BertConfig, the kind of feed-forward, and whether queries and keys are normalised."""

    feed_forward_type: str = "original"
    qk_norm: bool = False

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        positions = config.get("position_embedding_type") or "absolute"
        if positions != "alibi":
            raise UnsupportedModelError(f"position_embedding_type is {positions!r}; supported: 'alibi'")
        if config.get("is_decoder"):
            raise UnsupportedModelError("is_decoder is true; only the bidirectional encoder is supported")
        read = read_fields(cls, config, qk_norm=normalises(config))
        check_heads(read.hidden_size, read.num_attention_heads)
        supported = (*GATED, *(() if read.qk_norm else ("original",)))
        if read.feed_forward_type not in supported:
            raise UnsupportedModelError(
                f"feed_forward_type is {read.feed_forward_type!r}; supported"
                + f"{' with normalised queries' if read.qk_norm else ''}: {', '.join(supported)}"
            )
        activation(read.hidden_act)
        return read


def normalises(config: Mapping[str, Any]) -> bool:
    """Is the remote code the variant that normalises queries and keys?

    Raises:
        UnsupportedModelError: the code is of a repository that is not known.
    """
    named = str((config.get("auto_map") or {}).get("AutoModel") or "")
    repository, separator, _ = named.partition("--")
    if not separator:
        # The code lies beside the weights, as a copy of one or the other: of which, the weights' names will show.
        return config.get("_name_or_path") == QK_NORM
    if repository not in (PLAIN, QK_NORM):
        raise UnsupportedModelError(f"the remote code is of {repository!r}; replaced are {PLAIN!r} and {QK_NORM!r}")
    return repository == QK_NORM


class QKNormLayer(GatedLayer):
    """GatedLayer with queries and keys normalised, and the attention's result once more."""

    def __init__(self, config: Config, mlp: GatedMLP, dtype: str) -> None:
        width, eps = config.hidden_size, config.layer_norm_eps
        super().__init__(width, config.num_attention_heads, mlp, eps, dtype)
        self.query_norm = LayerNorm(width, eps)
        self.key_norm = LayerNorm(width, eps)
        self.inner_norm = LayerNorm(width, eps)

    def attend(
        self,
        x: Float[Array, "L M D"],
        rows: Rows,
        turn: Turn | None,
        bias: Float[Array, "_ N T T"] | None,
    ) -> Float[Array, "L M D"]:
        """x with what attention adds, normalised; `turn` is not for this model."""
        query, key, value = linears(x, [self.query, self.key, self.value])
        query, key = self.query_norm(query), self.key_norm(key)
        mixed = attention(query, key, value, rows, num_heads=self.num_heads, dtype=self.dtype, bias=bias)
        return self.attention_norm(x + linear_norm(mixed, self.output, x, self.inner_norm))


def make_layer(config: Config, dtype: str) -> PostNormLayer | GatedLayer:
    """BERT's layer, the gated one, or the one with more norms."""
    width, heads, eps = config.hidden_size, config.num_attention_heads, config.layer_norm_eps
    if config.feed_forward_type not in GATED:
        return PostNormLayer(width, config.intermediate_size, heads, config.hidden_act, eps, dtype)
    mlp = GatedMLP(width, config.intermediate_size, GATED[config.feed_forward_type], dtype, down_bias=True)
    return QKNormLayer(config, mlp, dtype) if config.qk_norm else GatedLayer(width, heads, mlp, eps, dtype)


def slopes(num_heads: int) -> list[float]:
    """How much a score falls with each place of distance, for each head.

    2^(-8 / n), 2^(-16 / n), ... for a power of two n; heads beyond one take those between, from the first on.
    """
    n = 1 << (num_heads.bit_length() - 1)
    return [2 ** (-8 * i / n) for i in range(1, n + 1)] + [2 ** (-8 * (i + 0.5) / n) for i in range(num_heads - n)]


class JinaBert(nnx.Module):
    """The encoder.

    Args:
        config: sizes.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        sizes = (config.vocab_size, config.hidden_size, config.type_vocab_size, config.layer_norm_eps)
        self.embeddings = WordEmbeddings(*sizes, dtype)
        self.layers = nnx.List([make_layer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.num_heads = config.num_attention_heads

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings' output and each layer's after it, as Hugging Face's `output_hidden_states`."""
        places = jnp.arange(tokens.rows.length, dtype=jnp.float32)
        distances = jnp.abs(places[None, :] - places[:, None])
        bias = -jnp.array(slopes(self.num_heads), jnp.float32)[None, :, None, None] * distances[None, None]
        states = [self.embeddings(tokens)]
        for layer in self.layers:
            states.append(layer(states[-1], tokens.rows, bias=bias))
        return states


ORIGINAL: Weights = {
    "embeddings.word.table": Weight("embeddings.word_embeddings.weight"),
    "embeddings.token_type.table": Weight("embeddings.token_type_embeddings.weight"),
    **norm_weights("embeddings.norm", "embeddings.LayerNorm"),
    **bert_layer_weights("layers.{n}", "encoder.layer.{n}"),
}
"""The feed-forward of BERT."""

QK_NORMS: Weights = {
    **ORIGINAL,
    **norm_weights("layers.{n}.query_norm", "encoder.layer.{n}.attention.self.layer_norm_q"),
    **norm_weights("layers.{n}.key_norm", "encoder.layer.{n}.attention.self.layer_norm_k"),
    **norm_weights("layers.{n}.inner_norm", "encoder.layer.{n}.attention.output.LayerNorm"),
    **norm_weights("layers.{n}.attention_norm", "encoder.layer.{n}.layer_norm_1"),
    **linear_weights("layers.{n}.mlp.up", "encoder.layer.{n}.mlp.up_gated_layer", part=(0, 2)),
    **linear_weights("layers.{n}.mlp.gate", "encoder.layer.{n}.mlp.up_gated_layer", part=(1, 2)),
    **linear_weights("layers.{n}.mlp.down", "encoder.layer.{n}.mlp.down_layer"),
    **norm_weights("layers.{n}.output_norm", "encoder.layer.{n}.layer_norm_2"),
}
"""The variant with more norms; the half that is the gate is the second here."""

WEIGHTS: Weights = {
    **QK_NORMS,
    **ORIGINAL,
    **linear_weights("layers.{n}.mlp.gate", "encoder.layer.{n}.mlp.gated_layers", part=(0, 2)),
    **linear_weights("layers.{n}.mlp.up", "encoder.layer.{n}.mlp.gated_layers", part=(1, 2)),
    **linear_weights("layers.{n}.mlp.down", "encoder.layer.{n}.mlp.wo"),
    **norm_weights("layers.{n}.output_norm", "encoder.layer.{n}.mlp.layernorm"),
}
"""The gated feed-forward. Each table has a line for every parameter of every kind; the one that fits best is used."""

IGNORED = (r"embeddings\.(position|token_type)_ids", r"pooler\..*", r"cls\..*", r"classifier\..*")

ARCHITECTURE = Architecture(
    model_type="jina_bert_v2",
    config=Config.from_hf,
    build=JinaBert,
    weights=WEIGHTS,
    alternatives=(QK_NORMS, {**WEIGHTS, **ORIGINAL}),
    ignored=IGNORED,
    prefixes=("", "bert."),
)
