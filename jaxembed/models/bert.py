"""BERT (https://arxiv.org/abs/1810.04805): a bidirectional encoder with learned positions and post-norm.

Reference: transformers' `BertModel` without its pooler, and the heads of `BertForSequenceClassification` and
`BertForMaskedLM`. Proven on all-MiniLM-L6-v2 and on random configurations.
"""

from jaxembed.architecture import Architecture
from jaxembed.blocks import BERT_WEIGHTS, OLD_NORM_NAMES, BertConfig, BertEmbeddings, PostNormEncoder
from jaxembed.heads import BERT_HEADS

__all__ = ["ARCHITECTURE", "Config", "build"]

Config = BertConfig


def build(config: Config, dtype: str) -> PostNormEncoder:
    """The encoder; `dtype` is of matrices and tables: "float32" or "bfloat16"."""
    return PostNormEncoder(BertEmbeddings(config, dtype), config, dtype)


IGNORED = (r"embeddings\.position_ids", r"pooler\..*", r"cls\..*", r"classifier\..*")

ARCHITECTURE = Architecture(
    model_type="bert",
    config=Config.from_hf,
    build=build,
    weights=BERT_WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "bert."),
    renames=OLD_NORM_NAMES,
    heads=BERT_HEADS,
)
