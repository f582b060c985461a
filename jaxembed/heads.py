"""What stands on an encoder's hidden states for another task than vectors: classification, masked language modelling.

Two computations serve nearly every architecture, which differ in names, activation and sizes. Letters in shapes are
those of `layers`; L labels, E width of the word table.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Head, Weight
from jaxembed.blocks import linear_weights, norm_weights
from jaxembed.layers import LayerNorm, Linear, activation, matmul, parameter
from jaxembed.pooling import pool
from jaxembed.tokens import Rows
from jaxembed.types import Pooling, PoolingMode

__all__ = [
    "BERT_HEADS",
    "Classifier",
    "MaskedLM",
    "classifier_head",
    "count_labels",
    "masked_lm_head",
    "shares_word_table",
]


class Classifier(nnx.Module):
    """Hidden states -> one number for each label: pooled, through a dense layer, then linear.

    Args:
        width: D.
        labels: L.
        dtype: of the matrices.
        act: Hugging Face's name of the activation behind the dense layer.
        mode: how token vectors become one.
        bias: whether the dense layer has one.
        norm: behind the activation.
    """

    def __init__(
        self,
        width: int,
        labels: int,
        dtype: str,
        *,
        act: str = "tanh",
        mode: PoolingMode = PoolingMode.CLS,
        bias: bool = True,
        norm: LayerNorm | None = None,
    ) -> None:
        self.dense = Linear((width, width), ("embed", "embed"), dtype, bias=bias)
        self.activation = activation(act)
        self.norm = norm
        self.output = Linear((width, labels), ("embed", "label"), dtype)
        self.pooling = Pooling((mode,))

    def __call__(self, hidden: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B L"]:
        pooled = pool(hidden, Rows(mask), jnp.zeros(hidden.shape[:1], jnp.int32), self.pooling)
        x = self.activation(self.dense(pooled[:, None]))
        return self.output(x if self.norm is None else self.norm(x))[:, 0]


class MaskedLM(nnx.Module):
    """Hidden states -> one number for each entry of the vocabulary, at each token: dense, activation, norm, table.

    Args:
        width: D.
        table: (V, E), the sizes of the table: E is also what the dense layer gives.
        dtype: of the matrices and the table.
        act: Hugging Face's name of the activation.
        eps: of the norm.
        tied: whether the table is the encoder's own for words.
        dense_bias, norm_bias, bias: which parts have one.
    """

    def __init__(
        self,
        width: int,
        table: tuple[int, int],
        dtype: str,
        *,
        act: str,
        eps: float,
        tied: bool,
        dense_bias: bool = True,
        norm_bias: bool = True,
        bias: bool = True,
    ) -> None:
        self.dense = Linear((width, table[1]), ("embed", "embed"), dtype, bias=dense_bias)
        self.activation = activation(act)
        self.norm = LayerNorm(table[1], eps, bias=norm_bias)
        self.table = None if tied else parameter(table, ("vocab", "embed"), dtype)
        self.bias = parameter(table[:1], ("vocab",)) if bias else None

    def __call__(self, hidden: Float[Array, "B T D"], encoder: nnx.Module) -> Float[Array, "B T V"]:
        x = self.norm(self.activation(self.dense(hidden)))
        table = word_table(encoder) if self.table is None else self.table[...]
        logits = matmul("BTE,VE->BTV", x, table, table.dtype)
        return logits if self.bias is None else logits + self.bias[...][None, None]


def word_table(encoder: Any) -> Float[Array, "V E"]:
    """The table that an encoder looks words up in."""
    table: Float[Array, "V E"] = getattr(encoder, "embeddings", encoder).word.table[...]
    return table


def count_labels(config: Mapping[str, Any]) -> int:
    """L, as config.json says it: by its names of the labels, else by number, else Hugging Face's default of 2."""
    names = config.get("id2label")
    return len(names) if names else int(config.get("num_labels") or 2)


def shares_word_table(config: Mapping[str, Any]) -> bool:
    """Whether the masked-language-model head has no table of its own."""
    return bool(config.get("tie_word_embeddings", True))


def classifier_head(dense: str, output: str, *, act: Callable[[Any], str] = lambda config: "tanh") -> Head:
    """A `Classifier` on the first token.

    Args:
        dense, output: the checkpoint's names of its two layers.
        act: (the encoder's Config) -> the activation between them.
    """

    def build(config: Any, given: Mapping[str, Any], dtype: str) -> Classifier:
        return Classifier(config.hidden_size, count_labels(given), dtype, act=act(config))

    return Head(build=build, weights={**linear_weights("dense", dense), **linear_weights("output", output)})


def masked_lm_head(
    dense: str,
    norm: str,
    decoder: str,
    *,
    bias: str | None = None,
    act: Callable[[Any], str] = lambda config: str(config.hidden_act),
    eps: Callable[[Any], float] = lambda config: float(config.layer_norm_eps),
    ignored: tuple[str, ...] = (),
) -> Head:
    """A `MaskedLM` whose table is as wide as the encoder's for words.

    Args:
        dense, norm, decoder: the checkpoint's names of its parts.
        bias: another name under which it may keep the decoder's bias.
        act, eps: (the encoder's Config) -> the activation, and what the norm adds to the variance.
        ignored: patterns of keys of the head that are rightly left over.
    """

    def build(config: Any, given: Mapping[str, Any], dtype: str) -> MaskedLM:
        width = config.hidden_size
        table = (config.vocab_size, getattr(config, "embedding_size", width))
        tied = shares_word_table(given)
        return MaskedLM(width, table, dtype, act=act(config), eps=eps(config), tied=tied)

    weights = {
        **linear_weights("dense", dense),
        **norm_weights("norm", norm),
        "table": Weight(f"{decoder}.weight"),
        "bias": Weight(f"{decoder}.bias"),
    }
    named = {**weights, "bias": Weight(bias)} if bias else None
    return Head(
        build=build,
        weights=weights,
        alternatives=(named,) if named else (),
        # Savers that write both names of the bias write one thing twice; Hugging Face computes with the decoder's.
        ignored=(*ignored, re.escape(bias)) if bias else ignored,
        own_table="table",
    )


BERT_HEADS = {
    SEQUENCE_CLASSIFICATION: classifier_head("pooler.dense", "classifier"),
    FILL_MASK: masked_lm_head(
        "cls.predictions.transform.dense",
        "cls.predictions.transform.LayerNorm",
        "cls.predictions.decoder",
        bias="cls.predictions.bias",
        ignored=(r"cls\.seq_relationship\..*",),
    ),
}
"""BERT's own, under its own names."""
