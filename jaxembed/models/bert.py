"""BERT (https://arxiv.org/abs/1810.04805): a bidirectional encoder with learned positions and post-norm.

Reference: transformers' `BertModel` without its pooler. Proven on all-MiniLM-L6-v2 and on random configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxembed.errors import UnsupportedModelError
from jaxembed.layers import Embedding, LayerNorm, Linear, activation, attention
from jaxembed.types import Architecture, Layout, Weight

__all__ = ["ARCHITECTURE", "Bert", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of Hugging Face's BertConfig that the encoder reads."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    @property
    def max_length(self) -> int:
        """Tokens that the position table has room for."""
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        positions = config.get("position_embedding_type") or "absolute"
        if positions != "absolute":
            raise UnsupportedModelError(f"position_embedding_type is {positions!r}; supported: 'absolute'")
        if config.get("is_decoder"):
            raise UnsupportedModelError("is_decoder is true; only the bidirectional BERT is supported")
        try:
            read = cls(**{name: config[name] for name in cls.__dataclass_fields__ if name in config})
        except TypeError as error:
            raise UnsupportedModelError(f"config.json is no BERT configuration: {error}") from None
        if read.hidden_size % read.num_attention_heads:
            raise UnsupportedModelError(
                f"hidden_size {read.hidden_size} does not divide into {read.num_attention_heads} heads"
            )
        activation(read.hidden_act)
        return read


class Embeddings(nnx.Module):
    """Word + position + token type, normalised. Every token is of type 0."""

    def __init__(self, config: Config, dtype: str) -> None:
        width = config.hidden_size
        self.word = Embedding((config.vocab_size, width), ("vocab", "embed"), dtype)
        self.position = Embedding((config.max_position_embeddings, width), ("position", "embed"), dtype)
        self.token_type = Embedding((config.type_vocab_size, width), ("token_type", "embed"), dtype)
        self.norm = LayerNorm(width, config.layer_norm_eps)

    def __call__(self, input_ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        positions = jnp.arange(input_ids.shape[1], dtype=jnp.int32)
        fixed = self.position(positions) + self.token_type(jnp.zeros((1,), jnp.int32))
        return self.norm(self.word(input_ids) + fixed[None])


class Layer(nnx.Module):
    """Self-attention and feed-forward, each added to its input and then normalised (post-norm)."""

    def __init__(self, config: Config, dtype: str) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.query = Linear((width, width), ("embed", "heads"), dtype)
        self.key = Linear((width, width), ("embed", "heads"), dtype)
        self.value = Linear((width, width), ("embed", "heads"), dtype)
        self.output = Linear((width, width), ("heads", "embed"), dtype)
        self.attention_norm = LayerNorm(width, config.layer_norm_eps)
        self.up = Linear((width, inner), ("embed", "mlp"), dtype)
        self.down = Linear((inner, width), ("mlp", "embed"), dtype)
        self.output_norm = LayerNorm(width, config.layer_norm_eps)
        self.activation = activation(config.hidden_act)
        self.num_heads = config.num_attention_heads
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
        mixed = attention(self.query(x), self.key(x), self.value(x), mask, num_heads=self.num_heads, dtype=self.dtype)
        x = self.attention_norm(x + self.output(mixed))
        return self.output_norm(x + self.down(self.activation(self.up(x))))


class Bert(nnx.Module):
    """The encoder.

    Args:
        config: the checkpoint's configuration.
        dtype: of matrices and embedding tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        self.embeddings = Embeddings(config, dtype)
        self.layers = nnx.List([Layer(config, dtype) for _ in range(config.num_hidden_layers)])

    def hidden_states(self, input_ids: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> list[Float[Array, "B T D"]]:
        """The embeddings' output and each layer's after it, as Hugging Face's `output_hidden_states`.

        Args:
            input_ids: token ids.
            mask: tokens that are not padding.
        """
        states = [self.embeddings(input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return states


SELF = "encoder.layer.{n}.attention.self."
LAYER = "encoder.layer.{n}."

WEIGHTS = {
    "embeddings.word.table": Weight("embeddings.word_embeddings.weight"),
    "embeddings.position.table": Weight("embeddings.position_embeddings.weight"),
    "embeddings.token_type.table": Weight("embeddings.token_type_embeddings.weight"),
    "embeddings.norm.scale": Weight("embeddings.LayerNorm.weight"),
    "embeddings.norm.bias": Weight("embeddings.LayerNorm.bias"),
    "layers.{n}.query.kernel": Weight(SELF + "query.weight", Layout.TRANSPOSED),
    "layers.{n}.query.bias": Weight(SELF + "query.bias"),
    "layers.{n}.key.kernel": Weight(SELF + "key.weight", Layout.TRANSPOSED),
    "layers.{n}.key.bias": Weight(SELF + "key.bias"),
    "layers.{n}.value.kernel": Weight(SELF + "value.weight", Layout.TRANSPOSED),
    "layers.{n}.value.bias": Weight(SELF + "value.bias"),
    "layers.{n}.output.kernel": Weight(LAYER + "attention.output.dense.weight", Layout.TRANSPOSED),
    "layers.{n}.output.bias": Weight(LAYER + "attention.output.dense.bias"),
    "layers.{n}.attention_norm.scale": Weight(LAYER + "attention.output.LayerNorm.weight"),
    "layers.{n}.attention_norm.bias": Weight(LAYER + "attention.output.LayerNorm.bias"),
    "layers.{n}.up.kernel": Weight(LAYER + "intermediate.dense.weight", Layout.TRANSPOSED),
    "layers.{n}.up.bias": Weight(LAYER + "intermediate.dense.bias"),
    "layers.{n}.down.kernel": Weight(LAYER + "output.dense.weight", Layout.TRANSPOSED),
    "layers.{n}.down.bias": Weight(LAYER + "output.dense.bias"),
    "layers.{n}.output_norm.scale": Weight(LAYER + "output.LayerNorm.weight"),
    "layers.{n}.output_norm.bias": Weight(LAYER + "output.LayerNorm.bias"),
}

IGNORED = (
    r"embeddings\.position_ids",
    r"pooler\..*",
    r"cls\..*",
)

ARCHITECTURE = Architecture(
    model_type="bert",
    config=Config.from_hf,
    build=Bert,
    weights=WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "bert."),
    # Checkpoints converted from TensorFlow keep its names for the norms.
    renames=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
)
