"""ERNIE 1.0 to 3.0 (https://arxiv.org/abs/1904.09223, 1907.12412, 2107.02137): BERT with embeddings of task types.

Reference: transformers' `ErnieModel` without its pooler, at task type 0, which it takes where none is given, and the
heads of `ErnieForSequenceClassification` and `ErnieForMaskedLM`. Proven on random configurations.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from jaxembed.architecture import Architecture, Weight, Weights
from jaxembed.blocks import BERT_WEIGHTS, OLD_NORM_NAMES, BertConfig, BertEmbeddings, PostNormEncoder
from jaxembed.heads import BERT_HEADS
from jaxembed.layers import Embedding
from jaxembed.lookups import LookUp
from jaxembed.tokens import Tokens

__all__ = ["ARCHITECTURE", "Config", "Embeddings", "build"]


@dataclass(frozen=True, kw_only=True)
class Config(BertConfig):
    """BertConfig, and the task types."""

    use_task_id: bool = False
    task_type_vocab_size: int = 3


class Embeddings(BertEmbeddings):
    """BERT's, and the embedding of task type 0 where the checkpoint has task types.

    Args:
        config: sizes.
        dtype: of the tables.
    """

    def __init__(self, config: Config, dtype: str) -> None:
        super().__init__(config, dtype)
        types = (config.task_type_vocab_size, config.hidden_size)
        self.task_type = Embedding(types, ("token_type", "embed"), dtype) if config.use_task_id else None

    def lookups(self, tokens: Tokens) -> list[LookUp]:
        """What is summed up and normalised: all that is known of each token."""
        found = super().lookups(tokens)
        return found if self.task_type is None else [*found, (self.task_type, jnp.zeros((1, 1), jnp.int32))]


def build(config: Config, dtype: str) -> PostNormEncoder:
    """The encoder; `dtype` is of matrices and tables: "float32" or "bfloat16"."""
    return PostNormEncoder(Embeddings(config, dtype), config, dtype)


WEIGHTS: Weights = {**BERT_WEIGHTS, "embeddings.task_type.table": Weight("embeddings.task_type_embeddings.weight")}

IGNORED = (r"embeddings\.position_ids", r"pooler\..*", r"cls\..*", r"classifier\..*", r"qa_outputs\..*")

ARCHITECTURE = Architecture(
    model_type="ernie",
    config=Config.from_hf,
    build=build,
    weights=WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "ernie."),
    renames=OLD_NORM_NAMES,
    heads=BERT_HEADS,
)
