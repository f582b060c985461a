"""BERT's parts, of which a whole family of architectures is made, and the lines that name parts in a checkpoint.

Letters in shapes are those of `layers` and `tokens`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxembed.architecture import Weight, Weights
from jaxembed.attention import attention
from jaxembed.configs import check_heads, read_fields
from jaxembed.errors import UnsupportedModelError
from jaxembed.layers import (
    LayerNorm,
    Linear,
    activation,
    feed_forward,
    linear_norm,
    linears,
)
from jaxembed.lookups import TokenTables, embedded
from jaxembed.tokens import Rows, Tokens

__all__ = [
    "BERT_EMBEDDINGS_WEIGHTS",
    "BERT_WEIGHTS",
    "OLD_NORM_NAMES",
    "BertConfig",
    "BertEmbeddings",
    "PostNormEncoder",
    "PostNormLayer",
    "bert_layer_weights",
    "linear_weights",
    "norm_weights",
]


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The fields of config.json that BERT and its kin read, with the defaults of Hugging Face's BertConfig."""

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
    def from_hf(cls, config: Mapping[str, Any]) -> "BertConfig":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        positions = config.get("position_embedding_type") or "absolute"
        if positions != "absolute":
            raise UnsupportedModelError(f"position_embedding_type is {positions!r}; supported: 'absolute'")
        if config.get("is_decoder"):
            raise UnsupportedModelError("is_decoder is true; only the bidirectional encoder is supported")
        read = read_fields(cls, config)
        check_heads(read.hidden_size, read.num_attention_heads)
        activation(read.hidden_act)
        return read


class BertEmbeddings(TokenTables):
    """Word + position + token type, normalised.

    Args:
        config: sizes.
        dtype: of the tables.
        width: of the tables and the norm, where it is not `config.hidden_size`.
        project: map the result linearly to `config.hidden_size`, as factorised embeddings are.
        padding: RoBERTa's places: they count from this token id + 1, and a token of this id has none of its own.
            None counts from 0.
    """

    def __init__(
        self,
        config: BertConfig,
        dtype: str,
        *,
        width: int | None = None,
        project: bool = False,
        padding: int | None = None,
    ) -> None:
        size = width or config.hidden_size
        positions, types = config.max_position_embeddings, config.type_vocab_size
        super().__init__(config.vocab_size, size, dtype, positions=positions, types=types)
        self.norm = LayerNorm(size, config.layer_norm_eps)
        self.projection = Linear((size, config.hidden_size), ("embed", "embed"), dtype) if project else None
        self.padding = padding

    def __call__(self, tokens: Tokens) -> Float[Array, "L M D"]:
        x = embedded(self.lookups(tokens), self.norm)
        return x if self.projection is None else self.projection(x)

    def places(self, tokens: Tokens) -> Int[Array, "_ M"]:
        """The row of the position table for each token."""
        if self.padding is None:
            return super().places(tokens)
        real = (tokens.input_ids != self.padding).astype(jnp.int32)
        counted = jnp.cumsum(tokens.rows.apart(real), axis=1, dtype=jnp.int32)
        return self.padding + real * tokens.rows.together(counted)


class PostNormLayer(nnx.Module):
    """BERT's layer: self-attention and feed-forward, each added to its input and then normalised (post-norm).

    Args:
        width: D.
        inner: F.
        num_heads: N.
        act: Hugging Face's name of the activation.
        eps: of the norms.
        dtype: of the matrices.
    """

    def __init__(self, width: int, inner: int, num_heads: int, act: str, eps: float, dtype: str) -> None:
        self.query = Linear((width, width), ("embed", "heads"), dtype)
        self.key = Linear((width, width), ("embed", "heads"), dtype)
        self.value = Linear((width, width), ("embed", "heads"), dtype)
        self.output = Linear((width, width), ("heads", "embed"), dtype)
        self.attention_norm = LayerNorm(width, eps)
        self.up = Linear((width, inner), ("embed", "mlp"), dtype)
        self.down = Linear((inner, width), ("mlp", "embed"), dtype)
        self.output_norm = LayerNorm(width, eps)
        self.act = act
        self.num_heads = num_heads
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, x: Float[Array, "L M D"], rows: Rows, bias: Float[Array, "_ N T T"] | None = None
    ) -> Float[Array, "L M D"]:
        """`bias` is added to the attention scores."""
        query, key, value = linears(x, [self.query, self.key, self.value])
        mixed = attention(query, key, value, rows, num_heads=self.num_heads, dtype=self.dtype, bias=bias)
        x = linear_norm(mixed, self.output, x, self.attention_norm)
        return feed_forward(x, self.up, self.act, self.down, self.output_norm)


class PostNormEncoder(nnx.Module):
    """Embeddings, then layers one after another.

    Args:
        embeddings: Tokens -> [L, M, D].
        config: the layers' sizes.
        dtype: of the matrices: "float32" or "bfloat16".
    """

    def __init__(self, embeddings: Callable[[Tokens], Float[Array, "L M D"]], config: BertConfig, dtype: str) -> None:
        self.embeddings = embeddings
        options = (config.num_attention_heads, config.hidden_act, config.layer_norm_eps, dtype)
        self.layers = nnx.List(
            [
                PostNormLayer(config.hidden_size, config.intermediate_size, *options)
                for _ in range(config.num_hidden_layers)
            ]
        )

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings' output and each layer's after it, as Hugging Face's `output_hidden_states`."""
        states = [self.embeddings(tokens)]
        for layer in self.layers:
            states.append(layer(states[-1], tokens.rows))
        return states


def linear_weights(path: str, name: str, *, bias: bool = True, part: tuple[int, int] = (0, 1)) -> dict[str, Weight]:
    """The lines of a WEIGHTS table for one `Linear` at our `path` that the checkpoint calls `name`."""
    lines = {f"{path}.kernel": Weight(f"{name}.weight", part=part)}
    return {**lines, f"{path}.bias": Weight(f"{name}.bias", part=part)} if bias else lines


def norm_weights(path: str, name: str, *, bias: bool = True) -> dict[str, Weight]:
    """The lines of a WEIGHTS table for one norm at our `path` that the checkpoint calls `name`."""
    lines = {f"{path}.scale": Weight(f"{name}.weight")}
    return {**lines, f"{path}.bias": Weight(f"{name}.bias")} if bias else lines


def bert_layer_weights(path: str, name: str) -> Weights:
    """The lines of a WEIGHTS table for `PostNormLayer`s at our `path`, under BERT's own names after `name`."""
    return {
        **linear_weights(f"{path}.query", f"{name}.attention.self.query"),
        **linear_weights(f"{path}.key", f"{name}.attention.self.key"),
        **linear_weights(f"{path}.value", f"{name}.attention.self.value"),
        **linear_weights(f"{path}.output", f"{name}.attention.output.dense"),
        **norm_weights(f"{path}.attention_norm", f"{name}.attention.output.LayerNorm"),
        **linear_weights(f"{path}.up", f"{name}.intermediate.dense"),
        **linear_weights(f"{path}.down", f"{name}.output.dense"),
        **norm_weights(f"{path}.output_norm", f"{name}.output.LayerNorm"),
    }


BERT_EMBEDDINGS_WEIGHTS: Weights = {
    "embeddings.word.table": Weight("embeddings.word_embeddings.weight"),
    "embeddings.position.table": Weight("embeddings.position_embeddings.weight"),
    "embeddings.token_type.table": Weight("embeddings.token_type_embeddings.weight"),
    **norm_weights("embeddings.norm", "embeddings.LayerNorm"),
}
"""`BertEmbeddings` as `embeddings`, under BERT's own names."""

BERT_WEIGHTS: Weights = {
    **BERT_EMBEDDINGS_WEIGHTS,
    **bert_layer_weights("layers.{n}", "encoder.layer.{n}"),
}
"""A `PostNormEncoder` on `BertEmbeddings`, under BERT's own names."""

OLD_NORM_NAMES = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
"""Checkpoints converted from TensorFlow keep its names for the norms."""
