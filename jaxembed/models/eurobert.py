"""EuroBERT (https://arxiv.org/abs/2503.05500): Llama's layers, with every token seeing every other.

Reference: transformers' `EuroBertModel`, the port of the class of that name that hub originals name as remote code.
Proven on random configurations.
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
    """DecoderConfig with Hugging Face's defaults for EuroBERT."""

    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DecoderConfig":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
        if theta is None:
            # The remote code's default need not be transformers'.
            raise UnsupportedModelError("config.json gives no rope_theta")
        return super().from_hf({**config, "is_causal": False})


ARCHITECTURE = Architecture(
    model_type="eurobert",
    config=Config.from_hf,
    build=Decoder,
    weights=DECODER_WEIGHTS,
    ignored=(*DECODER_IGNORED, r"dense\..*"),
    prefixes=DECODER_PREFIXES,
)
