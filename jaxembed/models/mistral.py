"""Mistral (https://arxiv.org/abs/2310.06825): a causal decoder whose layers all see through one window.

Reference: transformers' `MistralModel`. A query sees `sliding_window` tokens, itself among them. Proven on random
configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxembed.architecture import Architecture
from jaxembed.decoder import DECODER_IGNORED, DECODER_PREFIXES, DECODER_WEIGHTS, Decoder, DecoderConfig
from jaxembed.errors import UnsupportedModelError

__all__ = ["ARCHITECTURE", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """DecoderConfig with Hugging Face's defaults for Mistral."""

    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131_072
    sliding_window: int | None = 4096

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How far each layer sees, an inclusive radius; None for everything."""
        return (self.radius,) * self.num_hidden_layers

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        if "layer_types" in config:
            raise UnsupportedModelError("layer_types are given, which make a Ministral of it; supported: one window")
        return super().from_hf(config)


ARCHITECTURE = Architecture(
    model_type="mistral",
    config=Config.from_hf,
    build=Decoder,
    weights=DECODER_WEIGHTS,
    ignored=DECODER_IGNORED,
    prefixes=DECODER_PREFIXES,
)
