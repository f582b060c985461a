"""Gemma 3's text model (https://arxiv.org/abs/2503.19786), of which EmbeddingGemma is made (2509.20354).

Reference: transformers' `Gemma3TextModel`, causal or, with `use_bidirectional_attention`, in both directions. Most
layers have a window, and other rotary positions than those that see everything. Proven on random configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxembed.architecture import Architecture
from jaxembed.decoder import (
    DECODER_IGNORED,
    DECODER_PREFIXES,
    Decoder,
    DecoderConfig,
    decoder_rotary,
    decoder_weights,
    windows_of,
)
from jaxembed.errors import UnsupportedModelError

__all__ = ["ARCHITECTURE", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """DecoderConfig with Hugging Face's defaults for Gemma3Text, and the fields of its own.

    Attributes:
        sliding_window_pattern: where `layer_types` are not named: every so many layers, one sees everything.
    """

    num_key_value_heads: int | None = 4
    head_dim: int | None = 256
    max_position_embeddings: int = 131_072
    sliding_window: int | None = 4096
    sliding_window_pattern: int = 6
    query_pre_attn_scalar: float = 256.0
    use_bidirectional_attention: bool = False

    head_norms: ClassVar[bool] = True
    sandwich: ClassVar[bool] = True
    norm_offset: ClassVar[float] = 1.0

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.query_pre_attn_scalar**-0.5)

    @property
    def embedding_scale(self) -> float:
        """What embeddings are multiplied by."""
        return float(self.hidden_size**0.5)

    @property
    def radius(self) -> int | None:
        """`sliding_window` as an inclusive radius; in both directions the file gives the window's whole width."""
        if self.sliding_window is None or not self.use_bidirectional_attention:
            return super().radius
        return self.sliding_window // 2

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far each layer sees, an inclusive radius; None for everything."""
        kinds = self.layer_types or [
            "sliding_attention" if (n + 1) % self.sliding_window_pattern else "full_attention"
            for n in range(self.num_hidden_layers)
        ]
        return windows_of(kinds, self.num_hidden_layers, self.radius)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        if config.get("attn_logit_softcapping") is not None:
            raise UnsupportedModelError(
                f"attn_logit_softcapping is {config['attn_logit_softcapping']}; supported: null"
            )
        both = config.get("use_bidirectional_attention")
        if both not in (None, False, True):
            raise UnsupportedModelError(f"use_bidirectional_attention is {both!r}; supported: true, false")
        if both and not config.get("is_causal", True):
            raise UnsupportedModelError("use_bidirectional_attention is true and is_causal is false; supported: one")
        far, near = rotaries(config)
        read = super().from_hf(
            {
                **config,
                **far,
                "hidden_act": config.get("hidden_activation", "gelu_pytorch_tanh"),
                "is_causal": config.get("is_causal", True) and not both,
                "use_bidirectional_attention": bool(both),
                "query_pre_attn_scalar": float(config.get("query_pre_attn_scalar", 256.0)),
            }
        )
        return replace(read, sliding_rotary=decoder_rotary({**config, **near}, read.head_size))


def rotaries(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the rotary positions of layers that see everything, and of those with a window.

    transformers 5 has `rope_parameters` by kind of layer. Before, `rope_theta` and `rope_scaling` were for the first
    kind, `rope_local_base_freq` for the second.
    """
    given = config.get("rope_parameters") or {}
    far, near = ({**(given.get(kind) or {})} for kind in ("full_attention", "sliding_attention"))
    if given and not (far or near):
        raise UnsupportedModelError(
            f"rope_parameters are {dict(given)}; supported: one for each of full_attention and sliding_attention"
        )
    far = {"rope_theta": config.get("rope_theta") or 1_000_000.0, **far, **(config.get("rope_scaling") or {})}
    near = {"rope_theta": config.get("rope_local_base_freq") or 10_000.0, **near}
    return {"rope_scaling": far}, {"rope_scaling": near}


ARCHITECTURE = Architecture(
    model_type="gemma3_text",
    config=Config.from_hf,
    build=Decoder,
    weights=decoder_weights(
        mixed_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        output_norm="post_feedforward_layernorm",
    ),
    ignored=DECODER_IGNORED,
    prefixes=DECODER_PREFIXES,
)
