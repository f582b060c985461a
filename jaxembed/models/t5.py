"""T5's encoder (https://arxiv.org/abs/1910.10683) and mT5's (2010.11934): pre-norm, and distances instead of places.

Reference: transformers' `T5EncoderModel` and `MT5EncoderModel`, which are one computation. One bias by distance, of the
first layer, serves all layers; scores are not scaled; nothing but the norms has a scale and nothing has a bias. UMT5,
with a bias for each layer, is another model_type and is not read. Proven on random configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxembed.architecture import Architecture, Weight, Weights
from jaxembed.attention import attention
from jaxembed.blocks import linear_weights, norm_weights
from jaxembed.configs import read_fields
from jaxembed.errors import UnsupportedModelError
from jaxembed.layers import Embedding, Linear, RMSNorm, activation, gated_feed_forward, linears
from jaxembed.relative import DistanceBias
from jaxembed.tokens import Rows, Tokens

__all__ = ["ARCHITECTURE", "Config", "T5Encoder"]

FEED_FORWARD = {"t5": "relu", "mt5": "gated-gelu"}
"""What a config.json without `feed_forward_proj` means."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of config.json that the encoder reads, with the defaults of Hugging Face's T5Config."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    dense_act_fn: str
    is_gated_act: bool
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @property
    def hidden_size(self) -> int:
        """D, under the name that other architectures give it."""
        return self.d_model

    @property
    def max_length(self) -> None:
        """No limit: all that is further than the greatest distance shares a bucket."""
        return None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        if config.get("is_decoder"):
            raise UnsupportedModelError("is_decoder is true; only the bidirectional encoder is supported")
        act, gated = read_feed_forward(config)
        # Both are also in files of newer savers, and there they win, as in transformers.
        given = {"dense_act_fn": config.get("dense_act_fn", act), "is_gated_act": config.get("is_gated_act", gated)}
        read = read_fields(cls, config, **given)
        activation(read.dense_act_fn)
        buckets, furthest = read.relative_attention_num_buckets, read.relative_attention_max_distance
        if buckets < 4 or furthest <= buckets // 4:
            raise UnsupportedModelError(
                f"relative_attention_num_buckets is {buckets} and relative_attention_max_distance {furthest}; "
                "supported: 4 buckets or more, and a distance above a quarter of their number"
            )
        return read


def read_feed_forward(config: Mapping[str, Any]) -> tuple[str, bool]:
    """Activation and whether it is a gate, of `feed_forward_proj`: "relu", "gated-silu" and so on."""
    name = config.get("feed_forward_proj") or FEED_FORWARD.get(str(config.get("model_type")), "relu")
    gate, _, act = name.rpartition("-")
    if gate not in ("", "gated"):
        raise UnsupportedModelError(f"feed_forward_proj is {name!r}; supported: an activation, or 'gated-' and one")
    # T5 1.1 was trained with the tanh form and says "gelu".
    return "gelu_new" if name == "gated-gelu" else act, gate == "gated"


class FeedForward(nnx.Module):
    """down(act(inner(x))), or down(act(inner(x)) * up(x)) where the activation is a gate.

    Args:
        config: sizes and activation.
        dtype: of the matrices.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        size = (config.d_model, config.d_ff)
        self.inner = Linear(size, ("embed", "mlp"), dtype, bias=False)
        self.up = Linear(size, ("embed", "mlp"), dtype, bias=False) if config.is_gated_act else None
        self.down = Linear(size[::-1], ("mlp", "embed"), dtype, bias=False)
        self.act = config.dense_act_fn

    def __call__(self, x: Float[Array, "L M D"]) -> Float[Array, "L M D"]:
        if self.up is None:
            return self.down(self.inner(x, self.act))
        return gated_feed_forward(x, self.inner, self.act, self.up, self.down)


class Layer(nnx.Module):
    """Norm and self-attention, norm and feed-forward, each added to its input (pre-norm).

    Args:
        config: sizes. All heads together may be wider or narrower than D.
        dtype: of the matrices.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        size = (config.d_model, config.num_heads * config.d_kv)
        self.attention_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.query = Linear(size, ("embed", "heads"), dtype, bias=False)
        self.key = Linear(size, ("embed", "heads"), dtype, bias=False)
        self.value = Linear(size, ("embed", "heads"), dtype, bias=False)
        self.output = Linear(size[::-1], ("heads", "embed"), dtype, bias=False)
        self.mlp_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.mlp = FeedForward(config, dtype)
        self.num_heads = config.num_heads
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "L M D"], rows: Rows, bias: Float[Array, "1 N T T"]) -> Float[Array, "L M D"]:
        query, key, value = linears(self.attention_norm(x), [self.query, self.key, self.value])
        mixed = attention(
            query,
            key,
            value,
            rows,
            num_heads=self.num_heads,
            dtype=self.dtype,
            scale=1.0,
            bias=bias,
        )
        x = x + self.output(mixed)
        return x + self.mlp(self.mlp_norm(x))


class T5Encoder(nnx.Module):
    """Word table, layers that share one bias, and a norm.

    Args:
        config: sizes.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        self.word = Embedding((config.vocab_size, config.d_model), ("vocab", "embed"), dtype)
        distances = (config.relative_attention_num_buckets, config.relative_attention_max_distance)
        self.bias = DistanceBias(*distances, config.num_heads)
        self.layers = nnx.List([Layer(config, dtype) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings and each layer's output, the last one normalised, as Hugging Face's `output_hidden_states`."""
        bias = self.bias(tokens.rows.length)
        states = [self.word(tokens.input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], tokens.rows, bias))
        return [*states[:-1], self.norm(states[-1])]


BLOCK = "encoder.block.{n}.layer"

WEIGHTS: Weights = {
    "word.table": Weight("encoder.embed_tokens.weight"),
    "bias.buckets.table": Weight("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    **norm_weights("layers.{n}.attention_norm", f"{BLOCK}.0.layer_norm", bias=False),
    **linear_weights("layers.{n}.query", f"{BLOCK}.0.SelfAttention.q", bias=False),
    **linear_weights("layers.{n}.key", f"{BLOCK}.0.SelfAttention.k", bias=False),
    **linear_weights("layers.{n}.value", f"{BLOCK}.0.SelfAttention.v", bias=False),
    **linear_weights("layers.{n}.output", f"{BLOCK}.0.SelfAttention.o", bias=False),
    **norm_weights("layers.{n}.mlp_norm", f"{BLOCK}.1.layer_norm", bias=False),
    **linear_weights("layers.{n}.mlp.inner", f"{BLOCK}.1.DenseReluDense.wi_0", bias=False),
    **linear_weights("layers.{n}.mlp.up", f"{BLOCK}.1.DenseReluDense.wi_1", bias=False),
    **linear_weights("layers.{n}.mlp.down", f"{BLOCK}.1.DenseReluDense.wo", bias=False),
    **norm_weights("norm", "encoder.final_layer_norm", bias=False),
}
"""The encoder's own word table wins over the one it shares with a decoder, as in transformers, where both are there."""

SHARED: Weights = {**WEIGHTS, "word.table": Weight("shared.weight")}

IGNORED = (
    r"shared\.weight",
    r"encoder\.embed_tokens\.weight",
    r"decoder\..*",
    r"lm_head\..*",
    r"(classification_head|classifier|qa_outputs)\..*",
)

ARCHITECTURE = Architecture(
    model_type="t5",
    config=Config.from_hf,
    build=T5Encoder,
    weights=WEIGHTS,
    alternatives=(SHARED,),
    ignored=IGNORED,
    prefixes=("", "transformer."),
    renames=((r"DenseReluDense\.wi\.weight$", "DenseReluDense.wi_0.weight"),),
)
