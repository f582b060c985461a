"""Qwen3 (https://arxiv.org/abs/2505.09388), of which Qwen3-Embedding is made: queries and keys normalised by head.

Reference: transformers' `Qwen3Model`. Proven on random configurations.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxembed.architecture import Architecture
from jaxembed.decoder import DECODER_IGNORED, DECODER_PREFIXES, DECODER_WEIGHTS, Decoder, WindowedConfig

__all__ = ["ARCHITECTURE", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(WindowedConfig):
    """WindowedConfig with Hugging Face's defaults for Qwen3."""

    num_key_value_heads: int | None = 32
    head_dim: int | None = 128
    max_position_embeddings: int = 32_768

    head_norms: ClassVar[bool] = True


ARCHITECTURE = Architecture(
    model_type="qwen3",
    config=Config.from_hf,
    build=Decoder,
    weights=DECODER_WEIGHTS,
    ignored=DECODER_IGNORED,
    prefixes=DECODER_PREFIXES,
)
