"""The decoders' pre-norm layer with rotary positions and a gated feed-forward, of which Llama and its kin are made.

What sets the kin apart stands in their Configs: biases, norms of single heads, windows, whether a token sees those
behind it. Used as embedders: no cache, no language-model head. Letters in shapes are those of `layers`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxembed.architecture import Weight, Weights
from jaxembed.attention import attention
from jaxembed.configs import check_heads, read_fields
from jaxembed.errors import UnsupportedModelError
from jaxembed.gated import GatedMLP
from jaxembed.layers import Embedding, Linear, RMSNorm, activation, linears
from jaxembed.rotary import Rotary, Turn, read_rotary
from jaxembed.tokens import Rows, Tokens

__all__ = [
    "DECODER_IGNORED",
    "DECODER_PREFIXES",
    "DECODER_WEIGHTS",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "WindowedConfig",
    "decoder_rotary",
    "decoder_weights",
    "windows_of",
]


NOT_READ = Rotary(())
"""Positions while config.json is being read."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The fields of config.json that every decoder reads. A subclass gives Hugging Face's defaults for its kind.

    Attributes:
        rotary: positions of layers that see everything.
        sliding_rotary: positions of layers with a window.
        head_norms: are queries and keys normalised, head by head?
        sandwich: are the outputs of attention and feed-forward normalised too, before they are added?
        norm_offset: added to every norm's scale.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    is_causal: bool = True
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    rotary: Rotary = NOT_READ
    sliding_rotary: Rotary = NOT_READ

    head_norms: ClassVar[bool] = False
    sandwich: ClassVar[bool] = False
    norm_offset: ClassVar[float] = 0.0

    @property
    def max_length(self) -> int:
        """Tokens that the positions were made for."""
        return self.max_position_embeddings

    @property
    def head_size(self) -> int:
        """H."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        """K."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.head_size**-0.5)

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return 1.0

    @property
    def qkv_bias(self) -> bool:
        """Have queries, keys and values a bias?"""
        return self.attention_bias

    @property
    def output_bias(self) -> bool:
        """Has attention's output a bias?"""
        return self.attention_bias

    @property
    def radius(self) -> int | None:
        """`sliding_window` as an inclusive radius.

        transformers counts the token itself into a causal window, and not into that of a decoder whose config says
        `is_causal: false` (`masking_utils`).
        """
        return None if self.sliding_window is None else self.sliding_window - int(self.is_causal)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far each layer sees, an inclusive radius; None for everything."""
        return (None,) * self.num_hidden_layers

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        # null is false there: transformers asks whether the attribute is true.
        causal = bool(config.get("is_causal", True))
        read = read_fields(cls, config, is_causal=causal, layer_types=tuple(config.get("layer_types") or ()))
        if read.head_dim is None:
            check_heads(read.hidden_size, read.num_attention_heads)
        check_heads(read.num_attention_heads * read.head_size, read.num_attention_heads, read.key_value_heads)
        if read.head_size % 2:
            raise UnsupportedModelError(f"heads are {read.head_size} wide; rotary positions take pairs of features")
        activation(read.hidden_act)
        rotary = decoder_rotary(config, read.head_size)
        read = replace(read, rotary=rotary, sliding_rotary=rotary)
        for window in read.windows:
            if window is not None and window < 0:
                raise UnsupportedModelError(f"sliding_window is {read.sliding_window}; supported: at least 1")
        return read


def decoder_rotary(config: Mapping[str, Any], head_size: int) -> Rotary:
    """One kind of rotary positions, which turn whole heads: what transformers' decoders compute.

    Raises:
        UnsupportedModelError: the file asks for another kind.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    share = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share not in (None, 1):
        raise UnsupportedModelError(f"partial_rotary_factor is {share}; supported: 1")
    return read_rotary(config, head_size)


FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class WindowedConfig(DecoderConfig):
    """Qwen's fields of windows: the layers from `max_window_layers` on have one, unless `layer_types` names each."""

    use_sliding_window: bool = False
    max_window_layers: int = 28
    sliding_window: int | None = 4096

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far each layer sees, an inclusive radius; None for everything."""
        radius = self.radius if self.use_sliding_window else None
        kinds = self.layer_types or [
            SLIDING if radius is not None and n >= self.max_window_layers else FULL
            for n in range(self.num_hidden_layers)
        ]
        return windows_of(kinds, self.num_hidden_layers, radius)


def windows_of(layer_types: Sequence[str], layers: int, radius: int | None) -> tuple[int | None, ...]:
    """The window of each layer by its kind.

    Args:
        layer_types: "full_attention" or "sliding_attention", one a layer.
        layers: how many there are.
        radius: of a sliding layer.

    Raises:
        UnsupportedModelError: another kind, not one kind a layer, or a sliding layer where there is no window.
    """
    unknown = sorted(set(layer_types) - {FULL, SLIDING})
    if unknown:
        raise UnsupportedModelError(f"layer_types has {', '.join(unknown)}; supported: {FULL}, {SLIDING}")
    if len(layer_types) != layers:
        raise UnsupportedModelError(f"layer_types names {len(layer_types)} layers; num_hidden_layers is {layers}")
    if radius is None and SLIDING in layer_types:
        raise UnsupportedModelError(f"layer_types has {SLIDING}, but there is no sliding_window")
    return tuple(radius if kind == SLIDING else None for kind in layer_types)


class DecoderLayer(nnx.Module):
    """Self-attention and gated feed-forward, each on its normalised input and added to it (pre-norm).

    Args:
        config: sizes and options.
        window: how far a token sees, an inclusive radius; None for everything.
        dtype: of the matrices.
    """

    def __init__(self, config: DecoderConfig, window: int | None, dtype: str) -> None:
        width, head = config.hidden_size, config.head_size
        inner, kv_inner = config.num_attention_heads * head, config.key_value_heads * head

        def norm(size: int = width, axis: str = "embed") -> RMSNorm:
            return RMSNorm(size, config.rms_norm_eps, offset=config.norm_offset, axis=axis)

        self.attention_norm = norm()
        self.query = Linear((width, inner), ("embed", "heads"), dtype, bias=config.qkv_bias)
        self.key = Linear((width, kv_inner), ("embed", "heads"), dtype, bias=config.qkv_bias)
        self.value = Linear((width, kv_inner), ("embed", "heads"), dtype, bias=config.qkv_bias)
        self.output = Linear((inner, width), ("heads", "embed"), dtype, bias=config.output_bias)
        self.query_norm = norm(head, "head_dim") if config.head_norms else None
        self.key_norm = norm(head, "head_dim") if config.head_norms else None
        self.mixed_norm = norm() if config.sandwich else None
        self.mlp_norm = norm()
        self.mlp = GatedMLP(width, config.intermediate_size, config.hidden_act, dtype, bias=config.mlp_bias)
        self.output_norm = norm() if config.sandwich else None
        self.num_heads, self.kv_heads = config.num_attention_heads, config.key_value_heads
        self.scale, self.causal, self.window = config.attention_scale, config.is_causal, window
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "L M D"], rows: Rows, turn: Turn) -> Float[Array, "L M D"]:
        """`turn` gives queries and keys their positions."""
        query, key, value = linears(self.attention_norm(x), [self.query, self.key, self.value])
        mixed = attention(
            turn(by_head(self.query_norm, query, self.num_heads), self.num_heads),
            turn(by_head(self.key_norm, key, self.kv_heads), self.kv_heads),
            value,
            rows,
            num_heads=self.num_heads,
            num_key_value_heads=self.kv_heads,
            scale=self.scale,
            causal=self.causal,
            window=self.window,
            dtype=self.dtype,
        )
        y = self.output(mixed)
        x = x + (y if self.mixed_norm is None else self.mixed_norm(y))
        y = self.mlp(self.mlp_norm(x))
        return x + (y if self.output_norm is None else self.output_norm(y))


def by_head(norm: RMSNorm | None, x: Float[Array, "L M NH"], num_heads: int) -> Float[Array, "L M NH"]:
    """Normalise each head by itself."""
    return x if norm is None else norm(x.reshape(*x.shape[:2], num_heads, -1)).reshape(x.shape)


class Decoder(nnx.Module):
    """Embeddings, layers, and a norm at the end.

    Args:
        config: sizes and options.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: DecoderConfig, dtype: str) -> None:
        self.embedding = Embedding((config.vocab_size, config.hidden_size), ("vocab", "embed"), dtype)
        self.layers = nnx.List([DecoderLayer(config, window, dtype) for window in config.windows])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, offset=config.norm_offset)
        self.scale = config.embedding_scale
        self.rotary, self.sliding_rotary = config.rotary, config.sliding_rotary

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings and each layer's output after them, the last one normalised, as Hugging Face gives them."""
        places = tokens.rows.places
        turn, sliding_turn = self.rotary.turn(places), self.sliding_rotary.turn(places)
        states = [self.embedding(tokens.input_ids) * self.scale]
        for layer in self.layers:
            states.append(layer(states[-1], tokens.rows, turn if layer.window is None else sliding_turn))
        states[-1] = self.norm(states[-1])
        return states


LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}

NORMS = {
    "attention_norm": "input_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
}


def decoder_weights(**norms: str) -> Weights:
    """The WEIGHTS of a `Decoder`, whose layers have these names for their norms beside Llama's own."""
    table = {"embedding.table": Weight("embed_tokens.weight"), "norm.scale": Weight("norm.weight")}
    for path, name in LINEARS.items():
        table[f"layers.{{n}}.{path}.kernel"] = Weight(f"layers.{{n}}.{name}.weight")
        table[f"layers.{{n}}.{path}.bias"] = Weight(f"layers.{{n}}.{name}.bias")
    for path, name in {**NORMS, **norms}.items():
        table[f"layers.{{n}}.{path}.scale"] = Weight(f"layers.{{n}}.{name}.weight")
    return table


DECODER_WEIGHTS = decoder_weights()
"""Llama's names, with those of the parts that only some of the kin have."""

DECODER_IGNORED = (r"lm_head\..*", r"score\..*", r"classifier\..*", r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Heads, and a buffer of older savers."""

DECODER_PREFIXES = ("", "model.")
