"""Qwen2 (https://arxiv.org/abs/2407.10671): Llama with biases for queries, keys and values, and windows in late layers.

References: transformers' `Qwen2Model`, which sees in both directions where config.json says `is_causal: false`; and the
remote class of the same name in modeling_qwen.py (Alibaba-NLP/gte-Qwen2-1.5B-instruct and -7B-instruct,
NovaSearch/stella_en_1.5B_v5), which this file replaces where it computes the same. That code's tokenizer appends a
token: see `tokenizer_files.REMOTE`. Proven on random configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jaxembed.architecture import Architecture
from jaxembed.decoder import (
    DECODER_IGNORED,
    DECODER_PREFIXES,
    DECODER_WEIGHTS,
    Decoder,
    DecoderConfig,
    WindowedConfig,
)
from jaxembed.errors import UnsupportedModelError

__all__ = ["ARCHITECTURE", "ORIGINAL", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(WindowedConfig):
    """WindowedConfig with Hugging Face's defaults for Qwen2, whose biases are not in the file."""

    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32_768

    @property
    def qkv_bias(self) -> bool:
        """Queries, keys and values have one always."""
        return True

    @property
    def output_bias(self) -> bool:
        """Attention's output has none."""
        return False

    @classmethod
    def from_original(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read the config.json of a hub original, whose remote code knows less than transformers' class.

        Raises:
            UnsupportedModelError: a field is missing, or the remote code would compute something else.
        """
        read = cls.from_hf(config)
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        for name, given, replaced in (
            # Must be written: what the code does where it is not differs from revision to revision.
            ("is_causal", config.get("is_causal"), False),
            ("use_sliding_window", any(window is not None for window in read.windows), False),
            ("rope_type", rope.get("rope_type") or rope.get("type") or "default", "default"),
            ("head_dim", read.head_size, read.hidden_size // read.num_attention_heads),
        ):
            if given != replaced:
                raise UnsupportedModelError(
                    f"{name} is {given!r}; the remote code Qwen2Model is replaced where config.json says {replaced!r}"
                )
        return read


ARCHITECTURE = Architecture(
    model_type="qwen2",
    config=Config.from_hf,
    build=Decoder,
    weights=DECODER_WEIGHTS,
    ignored=DECODER_IGNORED,
    prefixes=DECODER_PREFIXES,
)

ORIGINAL = replace(ARCHITECTURE, config=Config.from_original)
"""The hub original, whose remote code is replaced."""
