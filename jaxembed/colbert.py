"""What a folder says of late interaction (ColBERT, https://arxiv.org/abs/2004.12832): three ways of writing, one value.

- sentence-transformers from 6.2 on: lengths and query expansion in sentence_bert_config.json, the tokens to leave out
  in a MultiVectorMask module.
- PyLate: all of it in config_sentence_transformers.json; masking and norm are code there, and no modules.
- Stanford's ColBERT: artifact.metadata, and the projection among the encoder's weights as `linear.weight`.

The reading is that of sentence-transformers 6.2's MultiVectorEncoder. Knows no tokenizer: tokens are words here.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxembed.errors import CorruptCheckpointError, UnsupportedModelError
from jaxembed.modules import Dense
from jaxembed.routes import Entry, read_json
from jaxembed.settings import calls, options
from jaxembed.tensors import Tensors

__all__ = ["STANFORD", "Expansion", "LateInteraction", "read_late_interaction", "read_projection"]

STANFORD = "HF_ColBERT"
"""The class that config.json of Stanford's folders names."""

MASK = "MultiVectorMask"
PUNCTUATION = tuple(string.punctuation)
QUERY_TOKENS = 32
"""Tokens of a query where a folder of the older kinds does not say."""

KNOBS = ("query_length", "document_length", "query_expansion")
"""What sentence_bert_config.json may say; PyLate writes the same into config_sentence_transformers.json."""

PYLATE = (
    *KNOBS,
    "attend_to_expansion_tokens",
    "attend_to_mask_tokens",
    "do_query_expansion",
    "document_prefix",
    "query_prefix",
    "skiplist_words",
)
"""By any of these in config_sentence_transformers.json PyLate's folders are known."""


@dataclass(frozen=True)
class Expansion:
    """Queries are filled up with a token whose vectors count as the others do.

    Attributes:
        length: tokens up to which they are.
        attend: whether attention sees the tokens added.
        fixed: whether longer queries are cut to `length`.
        token: the one added; None for the tokenizer's mask token, or where it has none, its end of a text.
    """

    length: int
    attend: bool = False
    fixed: bool = True
    token: str | None = None


@dataclass(frozen=True, kw_only=True)
class LateInteraction:
    """How a model makes vectors of tokens. Lengths count special tokens and prompt; None is the model's own.

    Attributes:
        length: tokens that a text may have which is neither query nor document.
        query_length, document_length: tokens that those may have.
        expansion: of queries; None for none.
        skip_words: tokens that get no vector.
        skip_tasks: in texts of these tasks; texts of no task count as documents.
        keep_ids: token ids that alone get vectors, but in queries; empty for all.
        markers: task -> what its prompt begins with: a single token, if the tokenizer knows it as one.
        measure: between queries and documents: maxsim, or meanmaxsim, which is divided by the number of the query's
            vectors.
        normalize: whether vectors are normalised though no module says so.
    """

    length: int | None = None
    query_length: int | None = None
    document_length: int | None = None
    expansion: Expansion | None = None
    skip_words: tuple[str, ...] = ()
    skip_tasks: tuple[str, ...] = ("document",)
    keep_ids: tuple[int, ...] = ()
    markers: Mapping[str, str] = field(default_factory=dict)
    measure: str = "maxsim"
    normalize: bool = False

    @property
    def longest(self) -> int | None:
        """The most tokens that a text of any kind may have; None where the model's own number is the most."""
        expanded = 0 if self.expansion is None else self.expansion.length
        lengths = (self.length, self.query_length, self.document_length, expanded)
        return None if None in lengths else max(length for length in lengths if length is not None)

    def prompts(self, given: Mapping[str, str]) -> dict[str, str]:
        """Prompts by name, the markers put before those of their tasks."""
        marked = {task: marker + given.get(task, "").removeprefix(marker) for task, marker in self.markers.items()}
        return {**given, **marked}


def read_late_interaction(
    root: Path,
    entries: Sequence[Entry],
    *,
    config: Mapping[str, Any],
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    length: int | None,
) -> LateInteraction | None:
    """What a folder says of late interaction; None where it is none of such a model.

    Args:
        root: the folder.
        entries: its modules; none for a folder without modules.json.
        config: config.json.
        settings: sentence_bert_config.json.
        extra: config_sentence_transformers.json.
        length: tokens that a text may have, as the other files say.

    Raises:
        CorruptCheckpointError: a setting is malformed.
        UnsupportedModelError: an option, or a combination of them, that is not implemented.
    """
    masks = [entry for entry in entries if entry.kind == MASK]
    native = bool(masks) or extra.get("model_type") == "MultiVectorEncoder"
    stanford = STANFORD in (config.get("architectures") or ())
    pylate = extra.get("model_type") == "ColBERT" or any(key in extra for key in PYLATE)
    if any(entry.kind == "Pooling" for entry in entries):
        if native:
            raise UnsupportedModelError(f"{root} has Pooling beside vectors of tokens; supported: either of them")
        return None
    if not (native or stanford or pylate):
        return None
    if len(masks) > 1:
        raise UnsupportedModelError(f"{root / 'modules.json'} has {len(masks)} {MASK} modules; supported: one")
    if stanford and not entries:
        found = read_stanford(read_json(root / "artifact.metadata", optional=True))
    else:
        found = read_pylate(extra) if pylate else {}
    if native:
        found["skip_words"] = ()
        found["normalize"] = False
    for entry in masks:
        found |= read_mask(read_json(entry.folder / "config.json"))
    found |= {key: settings[key] for key in KNOBS if key in settings}
    if calls(settings, root).get("max_length") is not None:
        # It is `length`, and stands above the two lengths.
        found |= {"query_length": None, "document_length": None}
    expansion = read_expansion(found.pop("query_expansion", None))
    sides = [given.get("padding_side") for given in (options(settings, "processor", root), calls(settings, root))]
    if expansion is not None and "left" in sides:
        raise UnsupportedModelError(f"{root}: queries are expanded on the left (padding_side); supported: on the right")
    queries, documents = (positive(found.pop(key, None), key) for key in ("query_length", "document_length"))
    if expansion is None:
        queries = queries or length
    elif queries is not None and queries < expansion.length:
        raise UnsupportedModelError(f"query_length is {queries}, less than the {expansion.length} of query_expansion")
    else:
        queries = expansion.length if expansion.fixed else queries or length
        if native and not masks and not expansion.attend:
            # The tokens added would be seen by nothing and count nowhere.
            expansion = None
    return LateInteraction(
        length=length,
        query_length=queries,
        document_length=documents or length,
        expansion=expansion,
        measure="meanmaxsim" if extra.get("similarity_fn_name") == "meanmaxsim" else "maxsim",
        **found,
    )


def read_pylate(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LateInteraction` from PyLate's config_sentence_transformers.json; those of KNOBS unread.

    Expansion is on unless it is switched off, and up to `query_length`. Punctuation is skipped unless other words are.
    """
    found = {key: extra[key] for key in KNOBS if extra.get(key) is not None or key == "query_expansion" in extra}
    if "query_expansion" not in extra and extra.get("do_query_expansion") is not False:
        attend = extra.get("attend_to_expansion_tokens", extra.get("attend_to_mask_tokens"))
        length = found.pop("query_length", QUERY_TOKENS)
        found["query_expansion"] = {"strategy": "fixed", "attend": bool(attend), "length": length}
    words = extra.get("skiplist_words")
    found["skip_words"] = PUNCTUATION if words is None else strings(words, "skiplist_words")
    sides = {"query": "query_prefix", "document": "document_prefix"}
    found["markers"] = {task: str(extra[key] or "") for task, key in sides.items() if key in extra}
    found["normalize"] = True
    return found


def read_stanford(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The same from artifact.metadata. A marker is a token there, which is text here: a space follows it."""
    measure = metadata.get("similarity", "cosine")
    if measure != "cosine":
        raise UnsupportedModelError(f"artifact.metadata says similarity {measure!r}; supported: 'cosine'")
    attend, length = bool(metadata.get("attend_to_mask_tokens")), metadata.get("query_maxlen") or QUERY_TOKENS
    return {
        "query_expansion": {"strategy": "fixed", "attend": attend, "length": length},
        "document_length": metadata.get("doc_maxlen"),
        "skip_words": PUNCTUATION if metadata.get("mask_punctuation", True) else (),
        "markers": {
            "query": f"{metadata.get('query_token_id') or '[unused0]'} ",
            "document": f"{metadata.get('doc_token_id') or '[unused1]'} ",
        },
        "normalize": True,
    }


def read_mask(given: Mapping[str, Any]) -> dict[str, Any]:
    """The same from the file of a MultiVectorMask module."""
    tasks, kept = given.get("skiplist_tasks"), given.get("keep_only_token_ids") or ()
    if not all(isinstance(one, int) for one in kept):
        raise CorruptCheckpointError(f"keep_only_token_ids is {kept!r}; it must be a list of token ids")
    return {
        "skip_words": strings(given.get("skiplist_words") or (), "skiplist_words"),
        "skip_tasks": ("document",)
        if tasks is None
        else strings([tasks] if isinstance(tasks, str) else tasks, "tasks"),
        "keep_ids": tuple(kept),
    }


def read_expansion(given: Any) -> Expansion | None:
    """`query_expansion`; null for none."""
    if given is None:
        return None
    known = {"strategy", "attend", "token", "length"}
    if not isinstance(given, Mapping) or not given.keys() <= known or given.get("strategy") not in ("fixed", "min"):
        raise UnsupportedModelError(
            f"query_expansion is {given!r}; supported: {', '.join(sorted(known))}, the strategy fixed or min"
        )
    length = positive(given.get("length"), "the length of query_expansion")
    attend, token = given.get("attend", False), given.get("token")
    if length is None or not isinstance(attend, bool) or not isinstance(token, str | None):
        raise CorruptCheckpointError(f"query_expansion is malformed: {given!r}")
    return Expansion(length, attend, given["strategy"] == "fixed", token)


def positive(given: Any, name: str) -> int | None:
    """A number of tokens, or None."""
    if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
        raise CorruptCheckpointError(f"{name} is {given!r}; it must be a number of tokens, at least 1")
    return given


def strings(given: Any, name: str) -> tuple[str, ...]:
    """A list of strings."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(one, str) for one in given):
        raise CorruptCheckpointError(f"{name} is {given!r}; it must be a list of strings")
    return tuple(given)


def read_projection(folder: Path) -> Dense:
    """The linear layer behind the encoder of one of Stanford's folders.

    Raises:
        CheckpointError: the weights cannot be read, or there is no such layer among them.
    """
    tensors = Tensors(folder)
    weight = tensors.get("linear.weight")
    if weight is None or weight.ndim != 2:
        raise CorruptCheckpointError(f"{folder} says it is a {STANFORD}, but holds no matrix 'linear.weight'")
    size, width = weight.shape
    return Dense(folder, width, size, bias=False, activation="linear", tokens=True, beside=True)
