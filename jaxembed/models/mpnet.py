"""MPNet (https://arxiv.org/abs/2004.09297): BERT with RoBERTa's places and a bias by the distance of two tokens.

Reference: transformers' `MPNetModel` without its pooler, and the heads of `MPNetForSequenceClassification` and
`MPNetForMaskedLM`. Two of its numbers are fixed, whatever config.json says:
places count from 1 + 1 (not `pad_token_id` + 1), and distances fall into 32 buckets. Proven on random configurations.
"""

from dataclasses import dataclass, replace

from jaxtyping import Array, Float

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture, Weight, Weights
from jaxembed.blocks import (
    BERT_EMBEDDINGS_WEIGHTS,
    BertConfig,
    BertEmbeddings,
    PostNormEncoder,
    linear_weights,
    norm_weights,
)
from jaxembed.errors import UnsupportedModelError
from jaxembed.heads import classifier_head, masked_lm_head
from jaxembed.relative import DistanceBias
from jaxembed.tokens import Tokens

__all__ = ["ARCHITECTURE", "Config", "MPNet"]

PADDING = 1
"""The id that has no place of its own."""

BUCKETS = 32
"""Rows of the bias table that are used."""

FURTHEST = 128
"""Distance up to which the buckets grow."""


@dataclass(frozen=True, kw_only=True)
class Config(BertConfig):
    """BertConfig, and the rows of the bias table. There are no token types."""

    relative_attention_num_buckets: int = BUCKETS

    def __post_init__(self) -> None:
        """The buckets must have their rows.

        Raises:
            UnsupportedModelError: they have not.
        """
        if self.relative_attention_num_buckets < BUCKETS:
            raise UnsupportedModelError(
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}; supported: {BUCKETS} or "
                f"more, of which {BUCKETS} are used"
            )

    @property
    def max_length(self) -> int:
        """Tokens that the position table has room for: the places up to the padding token's stay empty."""
        return self.max_position_embeddings - PADDING - 1


class MPNet(PostNormEncoder):
    """Embeddings, then layers that share one bias.

    Args:
        config: sizes.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        embeddings = BertEmbeddings(replace(config, type_vocab_size=0), dtype, padding=PADDING)
        super().__init__(embeddings, config, dtype)
        rows = config.relative_attention_num_buckets
        self.bias = DistanceBias(BUCKETS, FURTHEST, config.num_attention_heads, rows=rows)

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The embeddings' output and each layer's after it, as Hugging Face's `output_hidden_states`."""
        bias = self.bias(tokens.rows.length)
        states = [self.embeddings(tokens)]
        for layer in self.layers:
            states.append(layer(states[-1], tokens.rows, bias))
        return states


LAYER = "encoder.layer.{n}"

WEIGHTS: Weights = {
    **BERT_EMBEDDINGS_WEIGHTS,
    "bias.buckets.table": Weight("encoder.relative_attention_bias.weight"),
    **linear_weights("layers.{n}.query", f"{LAYER}.attention.attn.q"),
    **linear_weights("layers.{n}.key", f"{LAYER}.attention.attn.k"),
    **linear_weights("layers.{n}.value", f"{LAYER}.attention.attn.v"),
    **linear_weights("layers.{n}.output", f"{LAYER}.attention.attn.o"),
    **norm_weights("layers.{n}.attention_norm", f"{LAYER}.attention.LayerNorm"),
    **linear_weights("layers.{n}.up", f"{LAYER}.intermediate.dense"),
    **linear_weights("layers.{n}.down", f"{LAYER}.output.dense"),
    **norm_weights("layers.{n}.output_norm", f"{LAYER}.output.LayerNorm"),
}

IGNORED = (
    r"embeddings\.position_ids",
    r"pooler\..*",
    r"lm_head\..*",
    r"classifier\..*",
    r"qa_outputs\..*",
)

HEADS = {
    SEQUENCE_CLASSIFICATION: classifier_head("classifier.dense", "classifier.out_proj"),
    FILL_MASK: masked_lm_head(
        "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", bias="lm_head.bias", act=lambda config: "gelu"
    ),
}

ARCHITECTURE = Architecture(
    model_type="mpnet",
    config=Config.from_hf,
    build=MPNet,
    weights=WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "mpnet."),
    heads=HEADS,
)
