"""Real English texts that stand on every machine with Python: three sets, the same on each run.

The sources are the docstrings of the standard library and the descriptions of packages that jaxembed itself
requires. Texts are put in the order of their SHA-256: as good as shuffled, with no random generator whose results
could change, and one docstring more in another Python release displaces one text and not all of them. Two runs had
the same texts if their digests are equal.
"""

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from jaxembed.checkpoint import DEFAULT_MODEL, resolve

__all__ = ["SETS", "TextSet", "text_sets"]

PACKAGES = ("flax", "huggingface-hub", "jax", "ml-dtypes", "numpy", "tokenizers", "tqdm", "transformers")

SHORT = range(4, 21)
LONG = 256
VARIED = range(16, LONG + 1)
"""Tokens a text of each set may have, special tokens included."""

SETS = {"queries": 2000, "mixed": 1000, "long": 128}
"""Texts in each set. They are those of the default model's tokenizer, whatever model is measured: a fixed yardstick."""


@dataclass(frozen=True)
class TextSet:
    """Texts with their lengths.

    Attributes:
        name: queries, mixed or long.
        texts: the texts.
        lengths: tokens of each, special tokens included.
    """

    name: str
    texts: tuple[str, ...]
    lengths: tuple[int, ...]

    @property
    def digest(self) -> str:
        """Eight letters that are equal for equal texts."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()[:8]

    def first(self, count: int) -> "TextSet":
        """The first `count` texts."""
        return TextSet(self.name, self.texts[:count], self.lengths[:count])

    def times(self, count: int) -> "TextSet":
        """All texts so many times over, for engines that are through with them in no time."""
        return TextSet(self.name, self.texts * count, self.lengths * count)

    def row(self) -> tuple[str, ...]:
        """Statistics, as a line of a table: name, texts, tokens, percentiles, digest."""
        marks = "/".join(f"{mark:.0f}" for mark in np.percentile(self.lengths, (0, 5, 50, 95, 100)))
        return self.name, f"{len(self.texts):,}", f"{sum(self.lengths):,}", marks, self.digest


def text_sets() -> dict[str, TextSet]:
    """Make all three sets; takes some seconds.

    Raises:
        RuntimeError: this machine's Python has too few texts, as when it was installed without its sources.
    """
    tokenizer = Tokenizer.from_file(str(resolve(DEFAULT_MODEL) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    documents = shuffled(squeeze(text) for text in (*docstrings(), *descriptions()))
    sentences = shuffled(re.split(r"(?<=[.!?]) ", text, maxsplit=1)[0] for text in documents)
    return {
        "queries": choose("queries", tokenizer, sentences, SHORT),
        "mixed": choose("mixed", tokenizer, documents, VARIED),
        "long": choose("long", tokenizer, joined(tokenizer, documents), range(LONG - 16, LONG + 1)),
    }


def choose(name: str, tokenizer: Tokenizer, texts: Sequence[str], allowed: range) -> TextSet:
    """The first texts of an allowed length."""
    lengths = [len(one.ids) for one in tokenizer.encode_batch_fast(list(texts))]
    kept = [(text, length) for text, length in zip(texts, lengths, strict=True) if length in allowed][: SETS[name]]
    if len(kept) < SETS[name]:
        raise RuntimeError(f"only {len(kept)} of {SETS[name]} texts for the set {name!r}")
    return TextSet(name, *zip(*kept, strict=True))


def docstrings() -> Iterator[str]:
    """The docstrings of the standard library's top modules and of some packages."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder in (".", "asyncio", "concurrent/futures", "email", "html", "http", "importlib", "json", "logging"):
        for file in sorted((root / folder).glob("*.py")):
            # Only from body to body: a walk through every expression takes five times as long.
            waiting: list[ast.AST] = [ast.parse(file.read_bytes())]
            while waiting:
                node = waiting.pop()
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield ast.get_docstring(node) or ""
                    waiting.extend(node.body)


def descriptions() -> Iterator[str]:
    """The prose paragraphs of the packages' descriptions; those with markup or code are left out."""
    for package in PACKAGES:
        try:
            description = str(metadata(package).get_payload())
        except PackageNotFoundError:
            continue
        yield from (part for part in description.split("\n\n") if not re.search(r"[<>|`]|^\s*[-*#.]|://", part))


def squeeze(text: str) -> str:
    """Runs of white space as one space."""
    return " ".join(text.split())


def shuffled(texts: Iterator[str]) -> list[str]:
    """The distinct texts in an order that depends on nothing but themselves."""
    return sorted({text for text in texts if text}, key=lambda text: hashlib.sha256(text.encode()).digest())


def joined(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """Texts strung together until they are long, then cut at the end of the last word that LONG has room for."""
    result: list[str] = []
    held = ""
    for text in texts:
        held = f"{held} {text}".strip()
        one = tokenizer.encode(held)
        if len(one.ids) >= LONG:
            # The last place is the separator's; the word that is cut there goes as a whole.
            result.append(held[: one.offsets[LONG - 2][1]].rsplit(" ", 1)[0])
            held = ""
        if len(result) == 2 * SETS["long"]:
            break
    return result
