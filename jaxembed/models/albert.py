"""ALBERT (https://arxiv.org/abs/1909.11942): narrow tables, and layers that share their weights.

Reference: transformers' `AlbertModel` without its pooler, and the heads of `AlbertForSequenceClassification` and
`AlbertForMaskedLM`. The layers stand in groups; a group is run through as a whole
each time its turn comes. Proven on random configurations.
"""

from dataclasses import dataclass

from flax import nnx
from jaxtyping import Array, Float

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture, Weights
from jaxembed.blocks import (
    BERT_EMBEDDINGS_WEIGHTS,
    OLD_NORM_NAMES,
    BertConfig,
    BertEmbeddings,
    PostNormLayer,
    linear_weights,
    norm_weights,
)
from jaxembed.heads import classifier_head, masked_lm_head
from jaxembed.tokens import Tokens

__all__ = ["ARCHITECTURE", "Albert", "Config"]


@dataclass(frozen=True, kw_only=True)
class Config(BertConfig):
    """BertConfig, the width of the tables, and how layers share their weights."""

    embedding_size: int
    hidden_act: str = "gelu_new"
    num_hidden_groups: int = 1
    inner_group_num: int = 1

    @property
    def turns(self) -> tuple[int, ...]:
        """The group that each of the `num_hidden_layers` turns runs."""
        # A float division, as the reference's: in 18 turns of 14 groups it rounds the 9th down.
        share = self.num_hidden_layers / self.num_hidden_groups
        return tuple(int(turn / share) for turn in range(self.num_hidden_layers))


class Albert(nnx.Module):
    """Embeddings, widened to D, then the groups of layers, each for its turns.

    Args:
        config: sizes.
        dtype: of matrices and tables: "float32" or "bfloat16".
    """

    def __init__(self, config: Config, dtype: str) -> None:
        self.embeddings = BertEmbeddings(config, dtype, width=config.embedding_size, project=True)
        sizes = (config.hidden_size, config.intermediate_size, config.num_attention_heads)
        options = (config.hidden_act, config.layer_norm_eps, dtype)
        self.groups = nnx.List(
            [
                nnx.List([PostNormLayer(*sizes, *options) for _ in range(config.inner_group_num)])
                for _ in range(config.num_hidden_groups)
            ]
        )
        self.turns = config.turns

    def hidden_states(self, tokens: Tokens) -> list[Float[Array, "L M D"]]:
        """The widened embeddings and each inner layer's output, as Hugging Face's `output_hidden_states`."""
        states = [self.embeddings(tokens)]
        for group in self.turns:
            for layer in self.groups[group]:
                states.append(layer(states[-1], tokens.rows))
        return states


LAYER = "encoder.albert_layer_groups.{n}.albert_layers.{m}"

WEIGHTS: Weights = {
    **BERT_EMBEDDINGS_WEIGHTS,
    **linear_weights("embeddings.projection", "encoder.embedding_hidden_mapping_in"),
    **linear_weights("groups.{n}.{m}.query", f"{LAYER}.attention.query"),
    **linear_weights("groups.{n}.{m}.key", f"{LAYER}.attention.key"),
    **linear_weights("groups.{n}.{m}.value", f"{LAYER}.attention.value"),
    **linear_weights("groups.{n}.{m}.output", f"{LAYER}.attention.dense"),
    **norm_weights("groups.{n}.{m}.attention_norm", f"{LAYER}.attention.LayerNorm"),
    **linear_weights("groups.{n}.{m}.up", f"{LAYER}.ffn"),
    **linear_weights("groups.{n}.{m}.down", f"{LAYER}.ffn_output"),
    **norm_weights("groups.{n}.{m}.output_norm", f"{LAYER}.full_layer_layer_norm"),
}

IGNORED = (
    r"embeddings\.position_ids",
    r"pooler\..*",
    r"predictions\..*",
    r"sop_classifier\..*",
    r"classifier\..*",
    r"qa_outputs\..*",
)

HEADS = {
    SEQUENCE_CLASSIFICATION: classifier_head("pooler", "classifier"),
    FILL_MASK: masked_lm_head(
        "predictions.dense", "predictions.LayerNorm", "predictions.decoder", bias="predictions.bias"
    ),
}

ARCHITECTURE = Architecture(
    model_type="albert",
    config=Config.from_hf,
    build=Albert,
    weights=WEIGHTS,
    ignored=IGNORED,
    prefixes=("", "albert."),
    renames=OLD_NORM_NAMES,
    heads=HEADS,
)
