"""ModernBERT (https://arxiv.org/abs/2412.13663): rotary positions, gated feed-forward, pre-norm, and layers that look
everywhere between layers that look nearby.

Reference: transformers' `ModernBertModel`, and the heads of `ModernBertForSequenceClassification` and
`ModernBertForMaskedLM`. Both forms of config.json are read: `layer_types` with `rope_parameters` for
each type (transformers 5), and `global_attn_every_n_layers` with two thetas (before). Proven on random configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture, Head, Weight, Weights
from jaxembed.attention import attention
from jaxembed.blocks import linear_weights, norm_weights
from jaxembed.configs import check_heads, read_fields
from jaxembed.errors import UnsupportedModelError
from jaxembed.gated import GatedMLP
from jaxembed.heads import Classifier, MaskedLM, count_labels, shares_word_table
from jaxembed.layers import Embedding, LayerNorm, Linear, activation, linears
from jaxembed.lookups import embedded
from jaxembed.rotary import Rotary, Turn, read_rotary
from jaxembed.tokens import Rows, Tokens
from jaxembed.types import PoolingMode

__all__ = ["ARCHITECTURE", "Config", "ModernBert"]

FULL, SLIDING = "full_attention", "sliding_attention"

OLD_THETAS = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}
"""Where config.json said theta before transformers 5, and what it is where nothing is said."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of config.json that the encoder reads, with the defaults of Hugging Face's ModernBertConfig.

    Attributes:
        layer_types: of each layer: does it look everywhere, or nearby?
        window: how far a nearby layer looks, on either side: half of `local_attention`.
        full: rotary angles of layers that look everywhere.
        sliding: and of those that look nearby.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    layer_types: tuple[str, ...]
    window: int
    full: Rotary
    sliding: Rotary
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @property
    def max_length(self) -> int:
        """Tokens that the model was made for."""
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        # Hugging Face's name for half of `local_attention` wins where a file has both.
        window = config.get("sliding_window")
        head_dim = int(config.get("hidden_size", 0)) // int(config.get("num_attention_heads", 1))
        read = read_fields(
            cls,
            config,
            layer_types=read_layer_types(config),
            window=int(config.get("local_attention", 128)) // 2 if window is None else int(window),
            full=read_angles(config, head_dim, FULL),
            sliding=read_angles(config, head_dim, SLIDING),
        )
        check_heads(read.hidden_size, read.num_attention_heads)
        activation(read.hidden_activation)
        return read


def read_layer_types(config: Mapping[str, Any]) -> tuple[str, ...]:
    """`layer_types`, or what `global_attn_every_n_layers` makes of the number of layers.

    Raises:
        UnsupportedModelError: a type that is not implemented, or not one for each layer.
    """
    layers = int(config.get("num_hidden_layers", 0))
    given = config.get("layer_types")
    if given is None:
        every = int(config.get("global_attn_every_n_layers", 3))
        return tuple(SLIDING if n % every else FULL for n in range(layers))
    unknown = sorted(set(given) - {FULL, SLIDING})
    if unknown or len(given) != layers:
        raise UnsupportedModelError(
            f"layer_types names {', '.join(map(repr, unknown)) or f'{len(given)} layers of {layers}'}; "
            f"supported: {FULL!r} and {SLIDING!r}, one for each layer"
        )
    return tuple(given)


def read_angles(config: Mapping[str, Any], head_dim: int, layer_type: str) -> Rotary:
    """The rotary angles of one type of layer.

    Raises:
        UnsupportedModelError: a kind that is not implemented, or one for all types, which Hugging Face refuses too.
    """
    by_type = config.get("rope_parameters") or {}
    if not by_type.keys() <= OLD_THETAS.keys():
        raise UnsupportedModelError(
            f"rope_parameters has the keys {sorted(by_type)}; supported: one entry each for {FULL!r} and {SLIDING!r}"
        )
    given = by_type.get(layer_type) or {}
    # No model of this kind has them, and Hugging Face's own reading of them changed.
    for key, value in (("rope_scaling", config), ("partial_rotary_factor", given)):
        if value.get(key) is not None:
            raise UnsupportedModelError(f"{key} is {value[key]!r}; supported: rope_parameters that turn whole heads")
    name, default = OLD_THETAS[layer_type]
    # The first ModernBERT said null for "as in the other layers".
    theta = config.get(name, default) or config.get(OLD_THETAS[FULL][0], OLD_THETAS[FULL][1])
    positions = config.get("max_position_embeddings", Config.max_position_embeddings)
    alone = {"rope_parameters": given, "max_position_embeddings": positions}
    return read_rotary(alone, head_dim, default_theta=float(theta))


class Layer(nnx.Module):
    """Self-attention and gated feed-forward, each added to its input, which is normalised before (pre-norm).

    Args:
        config: sizes.
        dtype: of the matrices.
        first: the embeddings are normalised already: their layer begins without a norm.
        sliding: look nearby only?
    """

    def __init__(self, config: Config, dtype: str, *, first: bool, sliding: bool) -> None:
        width, bias = config.hidden_size, config.attention_bias
        self.attention_norm = None if first else LayerNorm(width, config.norm_eps, bias=config.norm_bias)
        self.query = Linear((width, width), ("embed", "heads"), dtype, bias=bias)
        self.key = Linear((width, width), ("embed", "heads"), dtype, bias=bias)
        self.value = Linear((width, width), ("embed", "heads"), dtype, bias=bias)
        self.output = Linear((width, width), ("heads", "embed"), dtype, bias=bias)
        self.mlp_norm = LayerNorm(width, config.norm_eps, bias=config.norm_bias)
        self.mlp = GatedMLP(width, config.intermediate_size, config.hidden_activation, dtype, bias=config.mlp_bias)
        self.num_heads = config.num_attention_heads
        self.window = config.window if sliding else None
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "L M D"], rows: Rows, turn: Turn) -> Float[Array, "L M D"]:
        y = x if self.attention_norm is None else self.attention_norm(x)
        query, key, value = linears(y, [self.query, self.key, self.value])
        mixed = attention(
            turn(query, self.num_heads),
            turn(key, self.num_heads),
            value,
            rows,
            num_heads=self.num_heads,
            dtype=self.dtype,
            window=self.window,
        )
        x = x + self.output(mixed)
        return x + self.mlp(self.mlp_norm(x))


class ModernBert(nnx.Module):
    """The encoder.

    Args:
        config: sizes.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        self.word = Embedding((config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype)
        self.embedding_norm = LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)
        self.layers = nnx.List(
            [
                Layer(config, dtype, first=n == 0, sliding=layer_type == SLIDING)
                for n, layer_type in enumerate(config.layer_types)
            ]
        )
        self.final_norm = LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias)
        self.full = config.full
        self.sliding = config.sliding

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings' output and each layer's after it, the last one after the final norm."""
        places = tokens.rows.places
        full, sliding = self.full.turn(places), self.sliding.turn(places)
        states = [embedded([(self.word, tokens.input_ids)], self.embedding_norm)]
        for layer in self.layers:
            states.append(layer(states[-1], tokens.rows, full if layer.window is None else sliding))
        states[-1] = self.final_norm(states[-1])
        return states


WEIGHTS = {
    "word.table": Weight("embeddings.tok_embeddings.weight"),
    **norm_weights("embedding_norm", "embeddings.norm"),
    **norm_weights("layers.{n}.attention_norm", "layers.{n}.attn_norm"),
    **linear_weights("layers.{n}.query", "layers.{n}.attn.Wqkv", part=(0, 3)),
    **linear_weights("layers.{n}.key", "layers.{n}.attn.Wqkv", part=(1, 3)),
    **linear_weights("layers.{n}.value", "layers.{n}.attn.Wqkv", part=(2, 3)),
    **linear_weights("layers.{n}.output", "layers.{n}.attn.Wo"),
    **norm_weights("layers.{n}.mlp_norm", "layers.{n}.mlp_norm"),
    **linear_weights("layers.{n}.mlp.gate", "layers.{n}.mlp.Wi", part=(0, 2)),
    **linear_weights("layers.{n}.mlp.up", "layers.{n}.mlp.Wi", part=(1, 2)),
    **linear_weights("layers.{n}.mlp.down", "layers.{n}.mlp.Wo"),
    **norm_weights("final_norm", "final_norm"),
}

IGNORED = (r"head\..*", r"decoder\..*", r"classifier\..*")

POOLING = {"cls": PoolingMode.CLS, "mean": PoolingMode.MEAN}
"""What config.json calls it in `classifier_pooling`."""


def build_classifier(config: Config, given: Mapping[str, Any], dtype: str) -> Classifier:
    """The head of classification; `given` is config.json.

    Raises:
        UnsupportedModelError: an activation or a pooling that is not implemented.
    """
    pooling = given.get("classifier_pooling", "cls")
    if pooling not in POOLING:
        raise UnsupportedModelError(f"classifier_pooling is {pooling!r}; supported: {', '.join(POOLING)}")
    return Classifier(
        config.hidden_size,
        count_labels(given),
        dtype,
        act=given.get("classifier_activation", "gelu"),
        mode=POOLING[pooling],
        bias=bool(given.get("classifier_bias", False)),
        norm=LayerNorm(config.hidden_size, config.norm_eps, bias=config.norm_bias),
    )


def build_masked_lm(config: Config, given: Mapping[str, Any], dtype: str) -> MaskedLM:
    """The head of masked language modelling; `given` is config.json.

    Raises:
        UnsupportedModelError: an activation that is not implemented.
    """
    return MaskedLM(
        config.hidden_size,
        (config.vocab_size, config.hidden_size),
        dtype,
        act=given.get("classifier_activation", "gelu"),
        eps=config.norm_eps,
        tied=shares_word_table(given),
        dense_bias=bool(given.get("classifier_bias", False)),
        norm_bias=config.norm_bias,
        bias=bool(given.get("decoder_bias", True)),
    )


HEAD: Weights = {**linear_weights("dense", "head.dense"), **norm_weights("norm", "head.norm")}

HEADS = {
    SEQUENCE_CLASSIFICATION: Head(build=build_classifier, weights={**HEAD, **linear_weights("output", "classifier")}),
    FILL_MASK: Head(
        build=build_masked_lm,
        weights={**HEAD, "table": Weight("decoder.weight"), "bias": Weight("decoder.bias")},
        own_table="table",
    ),
}

ARCHITECTURE = Architecture(
    model_type="modernbert",
    config=Config.from_hf,
    build=ModernBert,
    weights=WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "model."),
    heads=HEADS,
)
