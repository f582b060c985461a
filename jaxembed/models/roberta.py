"""RoBERTa (https://arxiv.org/abs/1907.11692), XLM-RoBERTa (1911.02116), CamemBERT (1911.03894): BERT with other places.

Reference: transformers' `RobertaModel`, `XLMRobertaModel` and `CamembertModel` without pooler, which are one
computation, and the heads of their `...ForSequenceClassification` and `...ForMaskedLM`. Places count from
`pad_token_id + 1`: 514 positions mean 512 tokens. Proven on random configurations.
"""

from dataclasses import dataclass

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture
from jaxembed.blocks import BERT_WEIGHTS, OLD_NORM_NAMES, BertConfig, BertEmbeddings, PostNormEncoder
from jaxembed.heads import classifier_head, masked_lm_head

__all__ = ["ARCHITECTURE", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config(BertConfig):
    """BertConfig, and the padding token's id."""

    pad_token_id: int = 1

    @property
    def max_length(self) -> int:
        """Tokens that the position table has room for: the places up to the padding token's stay empty."""
        return self.max_position_embeddings - self.pad_token_id - 1


def build(config: Config, dtype: str) -> PostNormEncoder:
    """The encoder; `dtype` is of matrices and tables: "float32" or "bfloat16"."""
    return PostNormEncoder(BertEmbeddings(config, dtype, padding=config.pad_token_id), config, dtype)


IGNORED = (r"embeddings\.position_ids", r"pooler\..*", r"lm_head\..*", r"classifier\..*")

HEADS = {
    SEQUENCE_CLASSIFICATION: classifier_head("classifier.dense", "classifier.out_proj"),
    FILL_MASK: masked_lm_head(
        "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", bias="lm_head.bias", act=lambda config: "gelu"
    ),
}

ARCHITECTURE = Architecture(
    model_type="roberta",
    config=Config.from_hf,
    build=build,
    weights=BERT_WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "roberta."),
    renames=OLD_NORM_NAMES,
    heads=HEADS,
)
