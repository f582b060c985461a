"""DistilBERT (https://arxiv.org/abs/1910.01108): BERT under other names, without token types.

Reference: transformers' `DistilBertModel`, and the heads of `DistilBertForSequenceClassification` and
`DistilBertForMaskedLM`. Sinusoidal places (`sinusoidal_pos_embds`) are a table in the checkpoint as
learned ones are, and read from there. Proven on random configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxembed import layers
from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture, Weights
from jaxembed.blocks import (
    BERT_EMBEDDINGS_WEIGHTS,
    BertConfig,
    BertEmbeddings,
    PostNormEncoder,
    linear_weights,
    norm_weights,
)
from jaxembed.configs import check_heads, read_fields
from jaxembed.heads import classifier_head, masked_lm_head

__all__ = ["ARCHITECTURE", "Config", "build"]

EPS = 1e-12
"""Of every norm."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The fields of config.json that the encoder reads, with the defaults of Hugging Face's DistilBertConfig."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    activation: str = "gelu"
    max_position_embeddings: int = 512

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.dim

    @property
    def max_length(self) -> int:
        """Tokens that the position table has room for."""
        return self.max_position_embeddings

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Config":
        """Read config.json.

        Raises:
            UnsupportedModelError: a field is missing, or asks for another kind of model.
        """
        read = read_fields(cls, config)
        check_heads(read.dim, read.n_heads)
        layers.activation(read.activation)
        return read


def build(config: Config, dtype: str) -> PostNormEncoder:
    """The encoder; `dtype` is of matrices and tables: "float32" or "bfloat16"."""
    bert = BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        intermediate_size=config.hidden_dim,
        hidden_act=config.activation,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=0,
        layer_norm_eps=EPS,
    )
    return PostNormEncoder(BertEmbeddings(bert, dtype), bert, dtype)


LAYER = "transformer.layer.{n}"

WEIGHTS: Weights = {
    **BERT_EMBEDDINGS_WEIGHTS,
    **linear_weights("layers.{n}.query", f"{LAYER}.attention.q_lin"),
    **linear_weights("layers.{n}.key", f"{LAYER}.attention.k_lin"),
    **linear_weights("layers.{n}.value", f"{LAYER}.attention.v_lin"),
    **linear_weights("layers.{n}.output", f"{LAYER}.attention.out_lin"),
    **norm_weights("layers.{n}.attention_norm", f"{LAYER}.sa_layer_norm"),
    **linear_weights("layers.{n}.up", f"{LAYER}.ffn.lin1"),
    **linear_weights("layers.{n}.down", f"{LAYER}.ffn.lin2"),
    **norm_weights("layers.{n}.output_norm", f"{LAYER}.output_layer_norm"),
}

IGNORED = (
    r"embeddings\.position_ids",
    r"vocab_(transform|layer_norm|projector)\..*",
    r"(pre_)?classifier\..*",
    r"qa_outputs\..*",
)

HEADS = {
    SEQUENCE_CLASSIFICATION: classifier_head("pre_classifier", "classifier", act=lambda config: "relu"),
    FILL_MASK: masked_lm_head(
        "vocab_transform",
        "vocab_layer_norm",
        "vocab_projector",
        act=lambda config: str(config.activation),
        eps=lambda config: EPS,
    ),
}

ARCHITECTURE = Architecture(
    model_type="distilbert",
    config=Config.from_hf,
    build=build,
    weights=WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "distilbert."),
    heads=HEADS,
)
