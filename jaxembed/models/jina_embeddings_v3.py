"""Jina Embeddings v3 (https://arxiv.org/abs/2409.10173): XLM-RoBERTa with rotary positions and adapters for tasks.

References: transformers' `JinaEmbeddingsV3Model`, and the remote class `XLMRobertaLoRA` of
jinaai/xlm-roberta-flash-implementation (revision bd55a5ec8e6c, as users pin it), which this file replaces. Proven on
random configurations; adapters against the same model with their products merged into its matrices
(https://arxiv.org/abs/2106.09685, section 4.1).

The original (jinaai/jina-embeddings-v3) holds its adapters in the file of its weights, one behind the other in each
array; `lora_adaptations` in config.json names them, and they are this model's tasks. The port's repository
(jinaai/jina-embeddings-v3-hf) holds each in a folder of its own (`retrieval_query/adapter_model.safetensors`), for a
library that adds them afterwards: these are not read, and a model of that form has the plain weights and no tasks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxembed.architecture import Architecture, Layout, Weight, Weights
from jaxembed.attention import attention
from jaxembed.blocks import linear_weights, norm_weights
from jaxembed.configs import check_heads, read_fields
from jaxembed.errors import UnsupportedModelError
from jaxembed.layers import Embedding, LayerNorm, Linear, activation, matmul, parameter
from jaxembed.rotary import Rotary, Turn, read_rotary
from jaxembed.tokens import Tokens

__all__ = ["ARCHITECTURE", "ORIGINAL", "Config", "JinaV3"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of config.json that the encoder reads, with the defaults of Hugging Face's JinaEmbeddingsV3Config.

    Attributes:
        rotary: angles of the places.
        lora_adaptations: the tasks, in the order in which the checkpoint holds their adapters.
        lora_rank: features between an adapter's two matrices.
        lora_alpha: an adapter's product is multiplied by lora_alpha / lora_rank.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    rotary: Rotary
    hidden_act: str = "gelu"
    max_position_embeddings: int = 8194
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-5
    lora_adaptations: tuple[str, ...] = ()
    lora_rank: int = 4
    lora_alpha: float | int = 1

    @property
    def max_length(self) -> int:
        """Tokens that the model was made for."""
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read the port's config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        rotary = read_rotary(config, head_size(config), default_theta=20_000.0)
        return checked(read_fields(cls, config, rotary=rotary, lora_adaptations=()), config)

    @classmethod
    def from_original(cls, config: Mapping[str, Any]) -> "Config":
        """Read the original's config.json, which has names of its own for the angles.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        head_dim = head_size(config)
        for name, supported in (
            ("rotary_emb_dim", (None, head_dim)),
            ("rotary_emb_scale_base", (None,)),
            ("rotary_emb_interleaved", (None, False)),
        ):
            if config.get(name) not in supported:
                raise UnsupportedModelError(f"{name} is {config[name]!r}; supported: {supported[-1]!r}")
        rotary = read_rotary({}, head_dim, default_theta=float(config.get("rotary_emb_base", 10_000.0)))
        return checked(read_fields(cls, config, rotary=rotary, lora_adaptations=adaptations(config)), config)


def head_size(config: Mapping[str, Any]) -> int:
    """H, as far as config.json says it: a missing field is reported elsewhere."""
    return int(config.get("hidden_size", 0)) // int(config.get("num_attention_heads", 1))


def checked(read: Config, config: Mapping[str, Any]) -> Config:
    """A Config whose every option is implemented.

    Raises:
        UnsupportedModelError: one is not.
    """
    check_heads(read.hidden_size, read.num_attention_heads)
    for name, supported in (("position_embedding_type", "rotary"), ("head_dim", head_size(config))):
        given = config.get(name)
        if given is not None and given != supported:
            raise UnsupportedModelError(f"{name} is {given!r}; supported: {supported!r}")
    if read.type_vocab_size < 1 or read.lora_rank < 1:
        raise UnsupportedModelError(
            f"type_vocab_size is {read.type_vocab_size} and lora_rank {read.lora_rank}; supported: at least 1"
        )
    activation(read.hidden_act)
    return read


def adaptations(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The original's tasks; none before adapters were trained.

    Raises:
        UnsupportedModelError: the file does not name its adapters.
    """
    if not config.get("load_trained_adapters"):
        return ()
    given = config.get("lora_adaptations")
    if not isinstance(given, list) or not given:
        raise UnsupportedModelError(f"lora_adaptations is {given!r}; supported: a list of tasks")
    return tuple(map(str, given))


class LoRA(nnx.Module):
    """What a task adds to a matrix: scaling * x @ a[task] @ b[task], of few features R between the two.

    Args:
        size: (input, output) features; for an embedding the rows are the input.
        axes: their logical names.
        config: the number of tasks A, R and the scaling.
        dtype: of the matrices.
    """

    def __init__(self, size: tuple[int, int], axes: tuple[str, str], config: Config, dtype: str) -> None:
        tasks, rank = len(config.lora_adaptations), config.lora_rank
        self.a = parameter((tasks, size[0], rank), ("adapter", axes[0], "rank"), dtype)
        self.b = parameter((tasks, rank, size[1]), ("adapter", "rank", axes[1]), dtype)
        self.scaling = config.lora_alpha / rank

    def __call__(self, x: Float[Array, "L M In"], tokens: Tokens) -> Float[Array, "L M Out"]:
        """For features; a row whose task is negative gets 0."""
        a, tasks = self.a[...], tokens.tasks
        low = matmul("BTI,BIR->BTR", tokens.rows.apart(x), a[jnp.maximum(tasks, 0)], a.dtype)
        return tokens.rows.together(self.widen(low, tasks))

    def look_up(self, ids: Int[Array, "L M"], tokens: Tokens) -> Float[Array, "L M Out"]:
        """For rows of a table; a row whose task is negative gets 0."""
        tasks = tokens.tasks
        low = self.a[...].at[jnp.maximum(tasks, 0)[:, None], tokens.rows.apart(ids)].get(mode="clip")
        return tokens.rows.together(self.widen(low, tasks))

    def widen(self, low: Float[Array, "B T R"], tasks: Int[Array, " B"]) -> Float[Array, "B T Out"]:
        """From R features to all."""
        b = self.b[...]
        scaling = jnp.where(tasks < 0, 0.0, self.scaling)[:, None, None]
        return matmul("BTR,BRO->BTO", low, b[jnp.maximum(tasks, 0)], b.dtype) * scaling


def lora(size: tuple[int, int], axes: tuple[str, str], config: Config, dtype: str) -> LoRA | None:
    """The adapters of a matrix, if the model has any."""
    return LoRA(size, axes, config, dtype) if config.lora_adaptations else None


class TaskLinear(Linear):
    """A linear map with adapters."""

    def __init__(self, size: tuple[int, int], axes: tuple[str, str], config: Config, dtype: str) -> None:
        super().__init__(size, axes, dtype)
        self.lora = lora(size, axes, config, dtype)

    def adapted(self, x: Float[Array, "L M In"], tokens: Tokens) -> Float[Array, "L M Out"]:
        """x @ kernel + bias, and what each row's task adds."""
        y = self(x)
        return y if self.lora is None else y + self.lora(x, tokens)


class TaskEmbedding(Embedding):
    """A table of vectors with adapters."""

    def __init__(self, size: tuple[int, int], axes: tuple[str, str], config: Config, dtype: str) -> None:
        super().__init__(size, axes, dtype)
        self.lora = lora(size, axes, config, dtype)

    def adapted(self, ids: Int[Array, "L M"], tokens: Tokens) -> Float[Array, "L M D"]:
        """The vectors of the ids, and what each row's task adds."""
        y = self(ids)
        return y if self.lora is None else y + self.lora.look_up(ids, tokens)


class Layer(nnx.Module):
    """Self-attention and feed-forward, each added to its input and then normalised (post-norm)."""

    def __init__(self, config: Config, dtype: str) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        self.query = Linear((width, width), ("embed", "heads"), dtype)
        self.key = Linear((width, width), ("embed", "heads"), dtype)
        self.value = Linear((width, width), ("embed", "heads"), dtype)
        # One for all three, side by side: its columns do not lie as the heads do.
        self.qkv_lora = lora((width, 3 * width), ("embed", "embed"), config, dtype)
        self.output = TaskLinear((width, width), ("heads", "embed"), config, dtype)
        self.attention_norm = LayerNorm(width, config.layer_norm_eps)
        self.up = TaskLinear((width, inner), ("embed", "mlp"), config, dtype)
        self.down = TaskLinear((inner, width), ("mlp", "embed"), config, dtype)
        self.output_norm = LayerNorm(width, config.layer_norm_eps)
        self.activation = activation(config.hidden_act)
        self.num_heads = config.num_attention_heads
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "L M D"], tokens: Tokens, turn: Turn) -> Float[Array, "L M D"]:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.qkv_lora is not None:
            more_q, more_k, more_v = jnp.split(self.qkv_lora(x, tokens), 3, axis=-1)
            q, k, v = q + more_q, k + more_k, v + more_v
        q, k = turn(q, self.num_heads), turn(k, self.num_heads)
        mixed = attention(q, k, v, tokens.rows, num_heads=self.num_heads, dtype=self.dtype)
        x = self.attention_norm(x + self.output.adapted(mixed, tokens))
        inner = self.activation(self.up.adapted(x, tokens))
        return self.output_norm(x + self.down.adapted(inner, tokens))


class JinaV3(nnx.Module):
    """The encoder.

    Args:
        config: sizes.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        width = config.hidden_size
        self.word = TaskEmbedding((config.vocab_size, width), ("vocab", "embed"), config, dtype)
        self.token_type = TaskEmbedding((config.type_vocab_size, width), ("token_type", "embed"), config, dtype)
        self.embedding_norm = LayerNorm(width, config.layer_norm_eps)
        self.layers = nnx.List([Layer(config, dtype) for _ in range(config.num_hidden_layers)])
        self.types = config.type_vocab_size
        self.rotary = config.rotary

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings' output and each layer's after it, as Hugging Face's `output_hidden_states`."""
        # With one type only, both texts of a pair are of it.
        types = jnp.minimum(tokens.token_types, self.types - 1)
        x = self.word.adapted(tokens.input_ids, tokens) + self.token_type.adapted(types, tokens)
        turn = self.rotary.turn(tokens.rows.places)
        states = [self.embedding_norm(x)]
        for layer in self.layers:
            states.append(layer(states[-1], tokens, turn))
        return states


def lora_weights(path: str, name: str, layout: Layout = Layout.TRANSPOSED) -> Weights:
    """The lines for the adapters at our `path` of a matrix that the checkpoint calls `name`.

    Behind the adapters' axis a linear map's stand as its matrix does, [R, in] and [out, R]; a table's as ours.
    """
    return {f"{path}.a": Weight(f"{name}.lora_A", layout), f"{path}.b": Weight(f"{name}.lora_B", layout)}


EMBEDDINGS = {
    "word.table": Weight("embeddings.word_embeddings.weight"),
    "token_type.table": Weight("embeddings.token_type_embeddings.weight"),
}

WEIGHTS = {
    **EMBEDDINGS,
    **lora_weights("word.lora", "embeddings.word_embeddings", Layout.SAME),
    **lora_weights("token_type.lora", "embeddings.token_type_embeddings", Layout.SAME),
    **norm_weights("embedding_norm", "emb_ln"),
    **linear_weights("layers.{n}.query", "encoder.layers.{n}.mixer.Wqkv", part=(0, 3)),
    **linear_weights("layers.{n}.key", "encoder.layers.{n}.mixer.Wqkv", part=(1, 3)),
    **linear_weights("layers.{n}.value", "encoder.layers.{n}.mixer.Wqkv", part=(2, 3)),
    **lora_weights("layers.{n}.qkv_lora", "encoder.layers.{n}.mixer.Wqkv"),
    **linear_weights("layers.{n}.output", "encoder.layers.{n}.mixer.out_proj"),
    **lora_weights("layers.{n}.output.lora", "encoder.layers.{n}.mixer.out_proj"),
    **norm_weights("layers.{n}.attention_norm", "encoder.layers.{n}.norm1"),
    **linear_weights("layers.{n}.up", "encoder.layers.{n}.mlp.fc1"),
    **lora_weights("layers.{n}.up.lora", "encoder.layers.{n}.mlp.fc1"),
    **linear_weights("layers.{n}.down", "encoder.layers.{n}.mlp.fc2"),
    **lora_weights("layers.{n}.down.lora", "encoder.layers.{n}.mlp.fc2"),
    **norm_weights("layers.{n}.output_norm", "encoder.layers.{n}.norm2"),
}
"""The original's names, under which transformers too saves the port."""

PORT_WEIGHTS = {
    **EMBEDDINGS,
    **norm_weights("embedding_norm", "embeddings.LayerNorm"),
    **linear_weights("layers.{n}.query", "layers.{n}.self_attn.q_proj"),
    **linear_weights("layers.{n}.key", "layers.{n}.self_attn.k_proj"),
    **linear_weights("layers.{n}.value", "layers.{n}.self_attn.v_proj"),
    **linear_weights("layers.{n}.output", "layers.{n}.self_attn.o_proj"),
    **norm_weights("layers.{n}.attention_norm", "layers.{n}.post_attention_layernorm"),
    **linear_weights("layers.{n}.up", "layers.{n}.mlp.fc1"),
    **linear_weights("layers.{n}.down", "layers.{n}.mlp.fc2"),
    **norm_weights("layers.{n}.output_norm", "layers.{n}.post_mlp_layernorm"),
}
"""The port's own names, under which it is saved on request."""

IGNORED = (r"pooler\..*", r"lm_head\..*", r"classifier\..*", r"qa_outputs\..*")

ARCHITECTURE = Architecture(
    model_type="jina_embeddings_v3",
    config=Config.from_hf,
    build=JinaV3,
    weights=WEIGHTS,
    alternatives=(PORT_WEIGHTS,),
    ignored=IGNORED,
    prefixes=("", "roberta."),
)

ORIGINAL = replace(
    ARCHITECTURE,
    config=Config.from_original,
    alternatives=(),
    # torch's names for a matrix that is computed from another, and for what it is computed with.
    renames=(
        (r"\.parametrizations\.weight\.original$", ".weight"),
        (r"\.parametrizations\.weight\.0\.(lora_[AB])$", r".\1"),
    ),
    tasks=adaptations,
)
"""The hub original, whose remote code is replaced."""
