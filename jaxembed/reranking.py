"""Scores of texts and of pairs of texts, by models with a head for classification: cross-encoders and classifiers.

What a pair is, what stands in the place of its logits and how documents are ranked is sentence-transformers'
CrossEncoder 6.2's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
from tqdm import tqdm

from jaxembed.checkpoint import Checkpoint
from jaxembed.errors import InputError, InputTypeError, UnsupportedModelError
from jaxembed.heads import count_labels
from jaxembed.runner import Runner
from jaxembed.types import Encoding, Output

__all__ = ["ACTIVATIONS", "Ranked", "default_activation", "label_names", "listed_pairs", "paired", "rank", "score"]

Scores = npt.NDArray[np.float32]

ACTIVATIONS: Mapping[str, Callable[[Scores], Scores]] = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "sigmoid": lambda x: np.asarray(scipy.special.expit(x), np.float32),
    "softmax": lambda x: np.asarray(scipy.special.softmax(x, axis=-1), np.float32),
    "tanh": lambda x: np.tanh(x),
}
"""What may be done to logits, float32 [n, L]; "softmax" is over the labels."""

CLASSES = {"Identity": "identity", "ReLU": "relu", "Sigmoid": "sigmoid", "Softmax": "softmax", "Tanh": "tanh"}
"""torch's classes, which checkpoints name -> the names above."""


@dataclass(frozen=True)
class Ranked:
    """A document's place among others.

    Attributes:
        index: where it stood in the list, counted from 0.
        score: larger is more relevant.
        document: the text itself.
    """

    index: int
    score: float
    document: str


def score(
    runner: Runner,
    items: Sequence[Any],
    tokenize: Callable[[Sequence[Any]], Sequence[Encoding]],
    *,
    activation: str | None = None,
    show_progress_bar: bool = False,
) -> Scores:
    """Scores for each label.

    Args:
        runner: of the model.
        items: n inputs.
        tokenize: makes the Encodings of a window of them.
        activation: a name in `ACTIVATIONS`; None for the model's own.
        show_progress_bar: on standard error.

    Returns:
        float32 [n, L].

    Raises:
        UnsupportedModelError: the model has no head for classification, or an activation that is not implemented.
        InputError: no such activation; or what `tokenize` raises.
    """
    # Raises before anything is tokenised.
    runner.engine(Output.SCORES)
    checkpoint = runner.model.checkpoint
    if activation is not None and activation not in ACTIVATIONS:
        raise InputError(f"activation is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")
    result = np.empty((len(items), count_labels(checkpoint.config)), np.float32)
    size = runner.model.dimension
    with tqdm(total=len(items), desc="scoring", unit="text", disable=not show_progress_bar) as bar:
        for done in runner.run(Output.SCORES, items, tokenize, dimensions=size, normalize=False):
            result[done.items] = done.rows
            bar.update(len(done.items))
    return ACTIVATIONS[activation or default_activation(checkpoint)](result)


def rank(documents: Sequence[str], scores: Scores, top_k: int | None) -> list[Ranked]:
    """Documents by their scores, best first; those that are equal stay in their order.

    Args:
        documents: n texts.
        scores: float32 [n].
        top_k: how many to give; None for all.
    """
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [Ranked(int(i), float(scores[i]), documents[i]) for i in order]


def default_activation(checkpoint: Checkpoint) -> str:
    """The name of the activation that a checkpoint asks for; of none, sigmoid for a single label and else identity.

    Raises:
        UnsupportedModelError: it names a class that is not implemented.
    """
    config = checkpoint.config
    named = [
        checkpoint.extra.get("activation_fn"),
        (config.get("sentence_transformers") or {}).get("activation_fn"),
        # Up to version 3.
        config.get("sbert_ce_default_activation_function"),
    ]
    given = next((str(path) for path in named if path is not None), None)
    if given is None:
        return "sigmoid" if count_labels(config) == 1 else "identity"
    name = CLASSES.get(given.rsplit(".", 1)[-1])
    if name is None or not given.startswith("torch."):
        raise UnsupportedModelError(
            f"the activation of the scores is {given!r}; supported: torch's {', '.join(CLASSES)}"
        )
    return name


def label_names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The names of the labels, in the order of their scores; Hugging Face's LABEL_0 and so on where none are given."""
    given: Mapping[str, Any] = checkpoint.config.get("id2label") or {}
    names = {int(number): str(name) for number, name in given.items()}
    return tuple(names.get(number, f"LABEL_{number}") for number in range(count_labels(checkpoint.config)))


def listed_pairs(pairs: Any) -> tuple[list[Any], bool]:
    """Pairs as a list, and whether it was a single one.

    Raises:
        InputTypeError: it is no pair of strings and no list.
    """
    if isinstance(pairs, np.ndarray):
        pairs = pairs.tolist()
    if isinstance(pairs, str | bytes | bytearray) or not isinstance(pairs, Sequence):
        raise InputTypeError(
            f"the input must be a pair of strings or a list of pairs, not {type(pairs).__name__}; classify takes texts"
        )
    single = len(pairs) > 0 and isinstance(pairs[0], str)
    return ([pairs] if single else list(pairs)), single


def paired(query: Any, documents: Any, top_k: Any) -> list[tuple[str, str]]:
    """The query with each document.

    Raises:
        InputTypeError: the query, or a document, is no string.
        InputError: `top_k` is no number above 0.
    """
    if not isinstance(query, str):
        raise InputTypeError(f"the query must be a string, not {type(query).__name__}")
    if isinstance(documents, str | bytes | bytearray) or not isinstance(documents, Sequence | np.ndarray):
        raise InputTypeError(f"documents must be a list of strings, not {type(documents).__name__}")
    for index, document in enumerate(documents):
        if not isinstance(document, str):
            raise InputTypeError(f"documents[{index}] must be a string, not {type(document).__name__}", index=index)
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"top_k is {top_k!r}; allowed: a whole number from 1 on, or None for all documents")
    return [(query, document) for document in documents]
