"""ELECTRA (https://arxiv.org/abs/2003.10555): BERT whose tables may be narrower than its layers.

Reference: transformers' `ElectraModel`, discriminator and generator alike, and the heads of
`ElectraForSequenceClassification` and `ElectraForMaskedLM`. Proven on random configurations.
"""

from dataclasses import dataclass

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture, Weights
from jaxembed.blocks import BERT_WEIGHTS, OLD_NORM_NAMES, BertConfig, BertEmbeddings, PostNormEncoder, linear_weights
from jaxembed.heads import classifier_head, masked_lm_head

__all__ = ["ARCHITECTURE", "Config", "build"]


@dataclass(frozen=True, kw_only=True)
class Config(BertConfig):
    """BertConfig, and the width of the tables."""

    embedding_size: int


def build(config: Config, dtype: str) -> PostNormEncoder:
    """The encoder; `dtype` is of matrices and tables: "float32" or "bfloat16"."""
    width = config.embedding_size
    embeddings = BertEmbeddings(config, dtype, width=width, project=width != config.hidden_size)
    return PostNormEncoder(embeddings, config, dtype)


WEIGHTS: Weights = {**BERT_WEIGHTS, **linear_weights("embeddings.projection", "embeddings_project")}

IGNORED = (
    r"embeddings\.position_ids",
    r"discriminator_predictions\..*",
    r"generator_(predictions|lm_head)\..*",
    r"classifier\..*",
    r"(sequence_summary|qa_outputs)\..*",
)

HEADS = {
    SEQUENCE_CLASSIFICATION: classifier_head("classifier.dense", "classifier.out_proj", act=lambda config: "gelu"),
    FILL_MASK: masked_lm_head(
        "generator_predictions.dense",
        "generator_predictions.LayerNorm",
        "generator_lm_head",
        act=lambda config: "gelu",
    ),
}

ARCHITECTURE = Architecture(
    model_type="electra",
    config=Config.from_hf,
    build=build,
    weights=WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "electra."),
    renames=OLD_NORM_NAMES,
    heads=HEADS,
)
