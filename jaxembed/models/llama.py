"""Llama (https://arxiv.org/abs/2302.13971, 2407.21783): the causal decoder that many embedders were made of.

Reference: transformers' `LlamaModel`. Proven on random configurations.
"""

from dataclasses import dataclass

from jaxembed.architecture import Architecture
from jaxembed.decoder import DECODER_IGNORED, DECODER_PREFIXES, DECODER_WEIGHTS, Decoder, DecoderConfig

__all__ = ["ARCHITECTURE", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(DecoderConfig):
    """DecoderConfig with Hugging Face's defaults for Llama."""

    max_position_embeddings: int = 2048


ARCHITECTURE = Architecture(
    model_type="llama",
    config=Config.from_hf,
    build=Decoder,
    weights=DECODER_WEIGHTS,
    ignored=DECODER_IGNORED,
    prefixes=DECODER_PREFIXES,
)
