"""Late interaction (ColBERT, https://arxiv.org/abs/2004.12832): a vector for each token, and MaxSim between them.

1. A text's task says its prompt and how long it may be.
2. A query is filled up with the model's expansion token; attention may see the tokens added, or not.
3. The engine gives a vector at each place.
4. Those of tokens that do not count are left out, such as punctuation in documents.
5. MaxSim: for each vector of the query the most alike of the document's, summed.

What is left out and added is as sentence-transformers 6.2's MultiVectorEncoder does it; BGE-M3's as FlagEmbedding.
Knows neither files nor prompts.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from jaxembed.colbert import LateInteraction
from jaxembed.errors import DimensionsError, InputError, InputTooLongError, InputTypeError, UnsupportedModelError
from jaxembed.model import Model
from jaxembed.runner import Runner
from jaxembed.tokenizer import Tokenizer
from jaxembed.types import NO_TASK, Encoding, Output

__all__ = ["DOCUMENT", "QUERY", "UNATTENDED", "TokenVectors", "max_similarity"]

QUERY, DOCUMENT = "query", "document"

UNATTENDED = (
    "albert",
    "bert",
    "distilbert",
    "electra",
    "ernie",
    "eurobert",
    "gemma3_text",
    "gte",
    "llama",
    "mistral",
    "modernbert",
    "mpnet",
    "nomic_bert",
    "qwen2",
    "qwen3",
    "roberta",
    "t5",
)
"""Architectures proven to compute the same as their originals at tokens that attention does not see."""

CHUNK = 2**25
"""Products of vectors that MaxSim holds in memory at once."""

Vectors = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


class TokenVectors:
    """How one model makes vectors of tokens: what is added to a text, and which of its vectors count.

    Args:
        model: the loaded model, of late interaction or not.
        tokenizer: its tokenizer.

    Raises:
        UnsupportedModelError: the architecture or the tokenizer does not go with the model's query expansion.
        ValueError: the model was loaded for shorter inputs than its queries are.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._settings = model.checkpoint.late or LateInteraction()
        # A layer beside the chain is BGE-M3's: not for the first token, and with a norm and a measure of its own.
        self._beside = Output.TOKENS in model.branches
        self.normalize = self._beside or (model.checkpoint.pooling is None and model.checkpoint.normalize)
        self.mean = self._beside or self._settings.measure == "meanmaxsim"
        self._skipped = skipped_ids(self._settings.skip_words, tokenizer)
        self._added = expansion_id(self._settings, tokenizer, model.architecture.model_type)

    def limit(self, task: str | None) -> int:
        """The most tokens that a text of a task may have."""
        given = {QUERY: self._settings.query_length, DOCUMENT: self._settings.document_length}
        length = given.get(task or "", self._settings.length)
        return self._tokenizer.max_length if length is None else min(length, self._tokenizer.max_length)

    def encode(
        self, items: Sequence[Any], *, task: str | None, prompt: str, number: int = NO_TASK, truncate: bool = True
    ) -> list[Encoding]:
        """Tokenise texts, or take token ids, and expand queries.

        Args:
            items: n texts, or n sequences of token ids, which get neither prompt nor special tokens.
            task: "query", "document" or None.
            prompt: text to put before each.
            number: `Encoding.task` of each.
            truncate: cut what is over-long; False raises.

        Raises:
            InputError: one of its kinds, naming the item.
        """
        limit = self.limit(task)
        cut = limit if truncate else None
        try:
            if items and isinstance(items[0], str):
                encodings = self._tokenizer.encode_texts(items, prompt=prompt, truncate_to=cut, task=number)
            else:
                encodings = self._tokenizer.encode_ids(items, truncate_to=cut, task=number)
        except InputTooLongError as error:
            # The tokenizer knows the model's own number only.
            raise InputTooLongError(index=error.index or 0, length=error.length, limit=limit) from None
        for index, one in enumerate(encodings):
            if len(one) > limit:
                raise InputTooLongError(index=index, length=len(one), limit=limit)
        return [self._expand(one) for one in encodings] if task == QUERY else encodings

    def _expand(self, encoding: Encoding) -> Encoding:
        """A query filled up."""
        expansion = self._settings.expansion
        missing = 0 if expansion is None else expansion.length - len(encoding)
        if expansion is None or missing <= 0:
            return encoding
        ids = np.concatenate([encoding.ids, np.full(missing, self._added, np.int32)])
        return replace(encoding, ids=ids, attended=None if expansion.attend else len(encoding))

    def kept(self, encoding: Encoding, task: str | None) -> npt.NDArray[np.bool_]:
        """Which of an Encoding's tokens count, bool [T]."""
        keep = np.arange(len(encoding)) >= int(self._beside)
        if (task or DOCUMENT) in self._settings.skip_tasks:
            keep &= ~np.isin(encoding.ids, self._skipped)
        if task != QUERY and self._settings.keep_ids:
            keep &= np.isin(encoding.ids, self._settings.keep_ids)
        return keep

    def run(
        self,
        runner: Runner,
        items: Sequence[Any],
        tokenize: Callable[[Sequence[Any]], Sequence[Encoding]],
        *,
        task: str | None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        show_progress_bar: bool = False,
    ) -> list[Vectors]:
        """Vectors of the tokens that count.

        Args:
            runner: the model's.
            items: n inputs.
            tokenize: makes the Encodings of a window of them, by `encode`.
            task: of all.
            dimensions: cut vectors to this size; None for the full one.
            normalize: L2-normalise; None for what the model does.
            show_progress_bar: on standard error.

        Returns:
            n arrays [t, E].

        Raises:
            DimensionsError: not a size of these vectors.
            CheckpointError: what `Runner.run` raises.
        """
        full = runner.model.token_dimension
        size = full if dimensions is None else dimensions
        if not 1 <= size <= full:
            raise DimensionsError(f"dimensions is {size}; allowed: 1 to {full}")
        unit = self.normalize if normalize is None else normalize
        found: dict[int, Vectors] = {}
        with tqdm(total=len(items), desc="encoding", unit="text", disable=not show_progress_bar) as bar:
            for done in runner.run(Output.TOKENS, items, tokenize, dimensions=size, normalize=unit):
                for item, encoding, row in zip(done.items, done.encodings, done.rows, strict=True):
                    # A copy: the row is a part of all that its batch gave.
                    found[int(item)] = row[: len(encoding), :size][self.kept(encoding, task)]
                bar.update(len(done.items))
        return [found[item] for item in range(len(items))]


def skipped_ids(words: Sequence[str], tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """The ids of the words that are tokens; the others are logged."""
    ids = {word: tokenizer.token_id(word) for word in words}
    lacking = [word for word, number in ids.items() if number is None]
    if lacking:
        logger.warning("no tokens of this tokenizer, and so not left out: %s", " ".join(lacking))
    return np.array([number for number in ids.values() if number is not None], np.int32)


def expansion_id(settings: LateInteraction, tokenizer: Tokenizer, architecture: str) -> int:
    """The id of the token that queries are filled up with; 0 where they are not. The errors are `TokenVectors`'."""
    expansion = settings.expansion
    if expansion is None:
        return 0
    if tokenizer.left_padded:
        raise UnsupportedModelError(
            "queries are expanded by a tokenizer that pads on the left; supported: on the right"
        )
    if not expansion.attend and architecture not in UNATTENDED:
        raise UnsupportedModelError(
            f"queries are expanded by tokens that attention does not see, which is not proven for {architecture!r}; "
            f"proven: {', '.join(UNATTENDED)}"
        )
    if expansion.length > tokenizer.max_length:
        raise ValueError(
            f"max_length is {tokenizer.max_length}; this model expands queries to {expansion.length} tokens"
        )
    if expansion.token is not None:
        found = tokenizer.token_id(expansion.token)
    else:
        found = tokenizer.roles.get("mask_token", tokenizer.roles.get("eos_token"))
    if found is None or found >= tokenizer.vocab_size:
        named = "a mask token and an end of texts" if expansion.token is None else repr(expansion.token)
        raise UnsupportedModelError(f"queries are expanded, but the tokenizer lacks {named}")
    return found


def max_similarity(queries: Any, documents: Any, *, mean: bool = False) -> Vectors:
    """MaxSim: for each vector of a query the largest product with one of a document, summed.

    Args:
        queries: n arrays [t, E], or one.
        documents: m of them.
        mean: divide by the number of the query's vectors.

    Returns:
        float32 [n, m]; -inf for a document without vectors.

    Raises:
        InputError: an item is no such array, or sizes differ.
    """
    sides = [listed(queries, "queries"), listed(documents, "documents")]
    sizes = {array.shape[1] for arrays in sides for array in arrays}
    if len(sizes) > 1:
        raise InputError(f"vectors of queries and documents must be of one size, not of {sorted(sizes)}")
    (asked, held), counts = sides, [np.array([len(array) for array in arrays], np.int64) for arrays in sides]
    scores = np.full((len(asked), len(held)), -np.inf, np.float32)
    # Nothing can be had of no vectors: the sum over none is 0, the largest of none -inf.
    filled = [np.flatnonzero(count) for count in counts]
    scores[np.ix_(counts[0] == 0, counts[1] > 0)] = 0.0
    for rows in groups(filled[0], counts[0], math.isqrt(CHUNK)):
        query = np.concatenate([asked[row] for row in rows])
        for columns in groups(filled[1], counts[1], CHUNK // len(query)):
            products = query @ np.concatenate([held[column] for column in columns]).T
            best = np.maximum.reduceat(products, starts(counts[1][columns]), axis=1)
            scores[np.ix_(rows, columns)] = np.add.reduceat(best, starts(counts[0][rows]), axis=0)
    return np.asarray(scores / np.maximum(counts[0], 1)[:, None], np.float32) if mean else scores


def listed(vectors: Any, name: str) -> list[Vectors]:
    """A list of arrays [t, E].

    Raises:
        InputTypeError: it is none, nor one such array.
    """
    given = [vectors] if isinstance(vectors, np.ndarray) and vectors.ndim == 2 else vectors
    if isinstance(given, str) or not isinstance(given, Sequence | np.ndarray):
        raise InputTypeError(f"{name} must be arrays [tokens, size], not {type(given).__name__}")
    arrays = [np.asarray(one, np.float32) for one in given]
    for index, array in enumerate(arrays):
        if array.ndim != 2:
            raise InputTypeError(
                f"{name}[{index}] must be an array [tokens, size], not of shape {array.shape}", index=index
            )
    return arrays


def groups(items: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], most: int) -> Iterator[npt.NDArray[np.int64]]:
    """Items in runs of up to `most` vectors, or of one item that has more."""
    start, total = 0, 0
    for place, item in enumerate(items):
        if total and total + counts[item] > most:
            yield items[start:place]
            start, total = place, 0
        total += int(counts[item])
    if start < len(items):
        yield items[start:]


def starts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each item begins, in the row of all of them."""
    return np.cumsum(counts) - counts
