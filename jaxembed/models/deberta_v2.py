"""DeBERTa v2 and v3 (https://arxiv.org/abs/2006.03654, 2111.09543): attention between contents and distances.

Reference: transformers' `DebertaV2Model`. To the scores of query and key come those of the query with the vector of
their distance ("c2p") and of the key with it ("p2c"). v2's larger models have a convolution beside the first layer.
The heads are those of `DebertaV2ForSequenceClassification` and of `DebertaV2ForMaskedLM` with `legacy`. Proven on
random configurations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture, Weight, Weights
from jaxembed.attention import attention
from jaxembed.blocks import linear_weights, norm_weights
from jaxembed.configs import check_heads, read_fields
from jaxembed.errors import UnsupportedModelError
from jaxembed.heads import classifier_head, masked_lm_head
from jaxembed.layers import (
    Embedding,
    LayerNorm,
    Linear,
    activation,
    feed_forward,
    linear_norm,
    linears,
    matmul,
    parameter,
)
from jaxembed.lookups import TokenTables, embedded, summed
from jaxembed.plain_attention import split_heads
from jaxembed.relative import distances, skew
from jaxembed.tokens import Rows, Tokens

__all__ = ["ARCHITECTURE", "Config", "DebertaV2", "log_buckets"]

KINDS = ("c2p", "p2c")
"""Scores with distances: of the query (content to position), of the key (position to content)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of config.json that encoder and heads read, with the defaults of Hugging Face's DebertaV2Config."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 0
    layer_norm_eps: float = 1e-7
    embedding_size: int
    position_biased_input: bool = True
    relative_attention: bool = False
    max_relative_positions: int
    position_buckets: int = -1
    pos_att_type: tuple[str, ...]
    share_att_key: bool = False
    norm_rel_ebd: tuple[str, ...]
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"
    pooler_hidden_act: str = "gelu"

    @property
    def max_length(self) -> int | None:
        """Tokens that the position table has room for; without one there is no limit."""
        return self.max_position_embeddings if self.position_biased_input else None

    @property
    def span(self) -> int:
        """Rows of the table of distances to either side."""
        return self.position_buckets if self.position_buckets > 0 else self.max_relative_positions

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read config.json. Its `legacy` chooses a language model's head and nothing else.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        furthest = config.get("max_relative_positions", -1)
        given = {
            "embedding_size": config.get("embedding_size") or config.get("hidden_size"),
            "max_relative_positions": furthest if furthest > 0 else config.get("max_position_embeddings", 512),
            "pos_att_type": names("pos_att_type", config.get("pos_att_type"), KINDS),
            "norm_rel_ebd": names("norm_rel_ebd", config.get("norm_rel_ebd", "none"), ("none", "layer_norm")),
        }
        read = read_fields(cls, config, **given)
        check_heads(read.hidden_size, read.num_attention_heads)
        head = config.get("attention_head_size", read.hidden_size // read.num_attention_heads)
        if head * read.num_attention_heads != read.hidden_size:
            raise UnsupportedModelError(f"attention_head_size is {head}; supported: hidden_size / num_attention_heads")
        activation(read.hidden_act)
        activation(read.conv_act)
        size, groups = read.conv_kernel_size, read.conv_groups
        if size > 0 and (size % 2 == 0 or read.hidden_size % groups):
            raise UnsupportedModelError(
                f"conv_kernel_size is {size} and conv_groups {groups}; supported: an odd size, and groups that "
                f"hidden_size {read.hidden_size} divides into"
            )
        middle = read.position_buckets // 2
        if read.relative_attention and read.position_buckets > 0 and not 0 < middle < read.max_relative_positions - 1:
            raise UnsupportedModelError(
                f"position_buckets is {read.position_buckets}; supported: 2 or more, half of which are fewer than "
                f"max_relative_positions {read.max_relative_positions} less one"
            )
        return read


def names(field: str, given: str | Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """A list, or names with "|" between them.

    Raises:
        UnsupportedModelError: one that is not known.
    """
    parts = given.lower().split("|") if isinstance(given, str) else list(given or ())
    found = tuple(part.strip() for part in parts if part.strip())
    for name in found:
        if name not in known:
            raise UnsupportedModelError(f"{field} has {name!r}; supported: {', '.join(known)}")
    return found


def log_buckets(distance: npt.NDArray[np.int64], buckets: int, furthest: int) -> npt.NDArray[np.int64]:
    """The bucket of each distance: itself up to half of `buckets`; beyond, in steps that grow by one factor.

    In float32 and in torch's order: where the logarithm is near a whole number its rounding decides.
    """
    middle = buckets // 2
    away = np.maximum(np.abs(distance), middle)
    growth = np.log(np.float32((furthest - 1) / middle))
    steps = np.ceil(np.log((away / middle).astype(np.float32)) / growth * np.float32(middle - 1))
    return np.where(away == middle, distance, np.sign(distance) * (steps.astype(np.int64) + middle))


class Relative(NamedTuple):
    """The vectors of distances that occur in rows of T tokens; every layer projects them anew.

    Attributes:
        vectors: each of the U that are used, once.
        of_query: for each column that `skew` takes, the vector that a query meets there.
        of_key: the same for a key.
    """

    vectors: Float[Array, "1 U D"]
    of_query: Int[Array, " R"]
    of_key: Int[Array, " R"]


class RelativeTable(nnx.Module):
    """A vector for each bucket of distances, normalised where the configuration says so.

    Args:
        config: sizes.
        dtype: of the table.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        width = config.hidden_size
        self.vectors = Embedding((2 * config.span, width), ("position", "embed"), dtype)
        self.norm = LayerNorm(width, config.layer_norm_eps) if "layer_norm" in config.norm_rel_ebd else None
        self.buckets = config.position_buckets
        self.furthest = config.max_relative_positions
        self.span = config.span

    def __call__(self, length: int) -> Relative:
        """What rows of `length` tokens need. The table counts the query's place less the key's."""
        ahead = distances(length)
        both = np.stack([-ahead, ahead])
        if self.buckets > 0:
            both = log_buckets(both, self.buckets, self.furthest)
        used, columns = np.unique(np.clip(both + self.span, 0, 2 * self.span - 1), return_inverse=True)
        vectors = self.vectors(jnp.asarray(used, jnp.int32))[None]
        of_query, of_key = columns.reshape(both.shape).astype(np.int32)
        return Relative(
            vectors if self.norm is None else self.norm(vectors), jnp.asarray(of_query), jnp.asarray(of_key)
        )


class Embeddings(TokenTables):
    """Word (+ position) (+ token type), mapped to D where the tables are of another width, normalised.

    Args:
        config: sizes.
        dtype: of the tables.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        size, width, types = config.embedding_size, config.hidden_size, config.type_vocab_size
        positions = config.max_position_embeddings if config.position_biased_input else 0
        super().__init__(config.vocab_size, size, dtype, positions=positions, types=types)
        self.projection = Linear((size, width), ("embed", "embed"), dtype, bias=False) if size != width else None
        self.norm = LayerNorm(width, config.layer_norm_eps)

    def __call__(self, tokens: Tokens) -> Float[Array, "L M D"]:
        lookups = self.lookups(tokens)
        if self.projection is None:
            return embedded(lookups, self.norm)
        return self.norm(self.projection(summed(lookups)))


class Convolution(nnx.Module):
    """norm(y + act(conv(x))): what the first layer made, and beside it neighbouring embeddings.

    Args:
        config: sizes.
        dtype: of the kernel, which stands as torch's: [output, input of a group, place].
    """

    def __init__(self, config: Config, dtype: str) -> None:
        width, self.groups = config.hidden_size, config.conv_groups
        shape = (width, width // self.groups, config.conv_kernel_size)
        self.kernel = parameter(shape, ("embed", "embed", "position"), dtype)
        self.bias = parameter((width,), ("embed",))
        self.norm = LayerNorm(width, config.layer_norm_eps)
        self.activation = activation(config.conv_act)

    def __call__(self, x: Float[Array, "L M D"], y: Float[Array, "L M D"], rows: Rows) -> Float[Array, "L M D"]:
        kernel = self.kernel[...]
        size = kernel.shape[-1]
        x = rows.apart(x)
        batch, length, width = x.shape
        # Padding is 0, as before the first token and behind the last one.
        padded = jnp.pad(jnp.where(rows.mask[:, :, None], x, 0.0), ((0, 0), (size // 2, size // 2), (0, 0)))
        near = jnp.stack([padded[:, i : i + length] for i in range(size)], axis=2)
        near = near.reshape(batch, length, size, self.groups, -1)
        grouped = kernel.reshape(self.groups, -1, *kernel.shape[1:])
        mixed = matmul("BTKGI,GOIK->BTGO", near, grouped, kernel.dtype).reshape(batch, length, width)
        return self.norm(y + self.activation(rows.together(mixed) + self.bias[...][None, None]))


class Layer(nnx.Module):
    """BERT's layer with attention to contents and distances.

    Args:
        config: sizes and kinds.
        dtype: of the matrices.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        kinds = config.pos_att_type

        def projection() -> Linear:
            return Linear((width, width), ("embed", "heads"), dtype)

        own = config.relative_attention and not config.share_att_key
        self.query, self.key, self.value = projection(), projection(), projection()
        self.position_key = projection() if own and "c2p" in kinds else None
        self.position_query = projection() if own and "p2c" in kinds else None
        self.output = Linear((width, width), ("heads", "embed"), dtype)
        self.attention_norm = LayerNorm(width, eps)
        self.up = Linear((width, inner), ("embed", "mlp"), dtype)
        self.down = Linear((inner, width), ("mlp", "embed"), dtype)
        self.output_norm = LayerNorm(width, eps)
        self.act = config.hidden_act
        self.num_heads = config.num_attention_heads
        self.kinds = kinds
        # The scores are sums of up to three products; they count as such where distances are not attended to, too.
        self.scale = float(width // self.num_heads * (1 + len(set(kinds)))) ** -0.5
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "L M D"], rows: Rows, relative: Relative | None) -> Float[Array, "L M D"]:
        query, key, value = linears(x, [self.query, self.key, self.value])
        bias = None
        if relative is not None and self.kinds:
            bias = self.bias(rows.apart(query), rows.apart(key), relative)
        mixed = attention(
            query,
            key,
            value,
            rows,
            num_heads=self.num_heads,
            dtype=self.dtype,
            scale=self.scale,
            bias=bias,
        )
        x = linear_norm(mixed, self.output, x, self.attention_norm)
        return feed_forward(x, self.up, self.act, self.down, self.output_norm)

    def bias(
        self, query: Float[Array, "B T ND"], key: Float[Array, "B T ND"], relative: Relative
    ) -> Float[Array, "B N T T"]:
        """The scores with distances, of every query with every key."""
        rows, length = query.shape[:2]
        bias = jnp.zeros((rows, self.num_heads, length, length), jnp.float32)
        if "c2p" in self.kinds:
            bias = bias + self.scores(query, self.position_key or self.key, relative.vectors, relative.of_query)
        if "p2c" in self.kinds:
            of_key = self.scores(key, self.position_query or self.query, relative.vectors, relative.of_key)
            bias = bias + jnp.swapaxes(of_key, 2, 3)
        return bias

    def scores(
        self, x: Float[Array, "B T ND"], project: Linear, vectors: Float[Array, "1 U D"], columns: Int[Array, " R"]
    ) -> Float[Array, "B N T T"]:
        """Products of queries (or keys) with the projected vectors of distances, laid out by the other's place."""
        positions = split_heads(project(vectors), self.num_heads)[0][:, columns]
        by_distance = matmul("BNTH,NRH->BNTR", split_heads(x, self.num_heads) * self.scale, positions, self.dtype)
        return skew(by_distance)


class DebertaV2(nnx.Module):
    """Embeddings, then layers that share one table of distances.

    Args:
        config: sizes.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        self.embeddings = Embeddings(config, dtype)
        self.relative = RelativeTable(config, dtype) if config.relative_attention else None
        self.layers = nnx.List([Layer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.convolution = Convolution(config, dtype) if config.conv_kernel_size > 0 else None

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings' output and each layer's after it, as Hugging Face's `output_hidden_states`."""
        relative = None if self.relative is None else self.relative(tokens.rows.length)
        states = [self.embeddings(tokens)]
        for layer in self.layers:
            y = layer(states[-1], tokens.rows, relative)
            if self.convolution is not None and len(states) == 1:
                y = self.convolution(states[0], y, tokens.rows)
            states.append(y)
        return states


LAYER = "encoder.layer.{n}"

WEIGHTS: Weights = {
    "embeddings.word.table": Weight("embeddings.word_embeddings.weight"),
    "embeddings.position.table": Weight("embeddings.position_embeddings.weight"),
    "embeddings.token_type.table": Weight("embeddings.token_type_embeddings.weight"),
    **linear_weights("embeddings.projection", "embeddings.embed_proj", bias=False),
    **norm_weights("embeddings.norm", "embeddings.LayerNorm"),
    "relative.vectors.table": Weight("encoder.rel_embeddings.weight"),
    **norm_weights("relative.norm", "encoder.LayerNorm"),
    "convolution.kernel": Weight("encoder.conv.conv.weight"),
    "convolution.bias": Weight("encoder.conv.conv.bias"),
    **norm_weights("convolution.norm", "encoder.conv.LayerNorm"),
    **linear_weights("layers.{n}.query", f"{LAYER}.attention.self.query_proj"),
    **linear_weights("layers.{n}.key", f"{LAYER}.attention.self.key_proj"),
    **linear_weights("layers.{n}.value", f"{LAYER}.attention.self.value_proj"),
    **linear_weights("layers.{n}.position_key", f"{LAYER}.attention.self.pos_key_proj"),
    **linear_weights("layers.{n}.position_query", f"{LAYER}.attention.self.pos_query_proj"),
    **linear_weights("layers.{n}.output", f"{LAYER}.attention.output.dense"),
    **norm_weights("layers.{n}.attention_norm", f"{LAYER}.attention.output.LayerNorm"),
    **linear_weights("layers.{n}.up", f"{LAYER}.intermediate.dense"),
    **linear_weights("layers.{n}.down", f"{LAYER}.output.dense"),
    **norm_weights("layers.{n}.output_norm", f"{LAYER}.output.LayerNorm"),
}

IGNORED = (
    # v3 keeps a table of places that it does not use.
    r"embeddings\.position_(ids|embeddings\.weight)",
    r"pooler\..*",
    r"classifier\..*",
    r"cls\..*",
    r"(qa_outputs|lm_predictions|mask_predictions)\..*",
)

HEADS = {
    SEQUENCE_CLASSIFICATION: classifier_head(
        "pooler.dense", "classifier", act=lambda config: str(config.pooler_hidden_act)
    ),
    FILL_MASK: masked_lm_head(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        bias="cls.predictions.bias",
    ),
}

ARCHITECTURE = Architecture(
    model_type="deberta-v2",
    config=Config.from_hf,
    build=DebertaV2,
    weights=WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "deberta."),
    heads=HEADS,
)
