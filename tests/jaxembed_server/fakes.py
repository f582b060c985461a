"""An engine and a tokenizer whose results can be worked out by hand, to test what surrounds them.

The engine's vector of a row is [sum of its ids, number of its ids, first id, 1]; the tokenizer's ids are the code
points of the text modulo 1,000, between the special ids 1 and 2.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxembed.buckets import Ladder
from jaxembed.checkpoint import Checkpoint
from jaxembed.matryoshka import Matryoshka
from jaxembed.tokenizer import Tokenizer
from jaxembed.types import Batch, Bucket, Column, Encoding
from jaxembed_server.config import ServerConfig
from jaxembed_server.model import Loaded, Progress

VOCAB = 1000
MAX_LENGTH = 16


class FakeEngine:
    """Counts, sums, and does what a test tells it to.

    Attributes:
        gate: `run` waits until this is set, with the batches that are `held`.
        held: which batches wait at the gate.
        started: set when a `run` has begun.
        batches: every batch that was run.
        failure: raised by `run` when set.
        spoil: changes the result before it is returned.
    """

    def __init__(self, ladder: Ladder | None = None, side_by_side: int = 1, *, shares_cores: bool = True) -> None:
        self.ladder = ladder or Ladder(Bucket(b, t) for b in (1, 4) for t in (4, 8, MAX_LENGTH))
        self.side_by_side, self.shares_cores = side_by_side, shares_cores
        self.counted = False
        self.dimension = 4
        self.gate = threading.Event()
        self.gate.set()
        self.held: Callable[[Batch], bool] = lambda batch: True
        self.started = threading.Event()
        self.batches: list[Batch] = []
        self.failure: Exception | None = None
        self.spoil: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]] = lambda vectors: vectors

    @property
    def compiled(self) -> frozenset[Bucket]:
        return frozenset(self.ladder.buckets)

    def kept(self) -> Ladder | None:
        return None

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        self.batches.append(batch)
        self.started.set()
        assert not self.held(batch) or self.gate.wait(30), "a test forgot to open the gate"
        if self.failure is not None:
            raise self.failure
        lengths = batch.column(Column.LENGTH)
        vectors = np.stack([vector(ids[:n]) for ids, n in zip(batch.input_ids, lengths, strict=True)])
        return self.spoil(vectors[: batch.rows])

    def computed(self, batch: Batch) -> int:
        return batch.bucket.tokens

    @property
    def rows(self) -> int:
        return sum(batch.rows for batch in self.batches)


def vector(ids: Sequence[int] | npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """What the fake engine gives for these ids."""
    return np.array([sum(ids), len(ids), ids[0] if len(ids) else 0, 1], np.float32)


def encoding(*ids: int) -> Encoding:
    return Encoding(np.array(ids, np.int32))


class FakeBackend:
    """The part of `tokenizers.Tokenizer` that our Tokenizer calls."""

    def no_padding(self) -> None: ...

    def no_truncation(self) -> None: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> SimpleNamespace:
        ids = [ord(character) % VOCAB for character in text]
        mask = [0] * len(ids)
        if add_special_tokens:
            ids, mask = [1, *ids, 2], [1, *mask, 1]
        return SimpleNamespace(ids=ids, special_tokens_mask=mask)

    def post_process(self, encoding: Any) -> SimpleNamespace:
        return SimpleNamespace(special_tokens_mask=[1, *[0] * len(encoding.ids), 1])

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool = True) -> list[SimpleNamespace]:
        for text in texts:
            text.encode()
        return [self.encode(text, add_special_tokens) for text in texts]


def ids_of(text: str) -> list[int]:
    """The ids of a text with its special tokens."""
    return FakeBackend().encode(text).ids


def loaded(
    engine: FakeEngine,
    *,
    sizes: tuple[int, ...] | None = (2, 3),
    normalize: bool = False,
    dimensions: int | None = None,
    tasks: tuple[str, ...] = (),
) -> Loaded:
    """A model around a fake engine."""
    return Loaded(
        checkpoint=Checkpoint(
            name="fake",
            folder=Path(),
            config={},
            normalize=normalize,
            prompts={"query": "q:", "document": "d:"},
            dimensions=dimensions,
        ),
        tokenizer=Tokenizer(FakeBackend(), special_ids=frozenset({1, 2}), vocab_size=VOCAB, max_length=MAX_LENGTH),
        engine=engine,
        matryoshka=Matryoshka(engine.dimension, sizes or (), sizes is not None),
        tasks=tasks,
    )


def loader(engine: FakeEngine, **options: object) -> Callable[[ServerConfig, Progress], Loaded]:
    """What `create_app` takes in place of `load_model`."""

    def load(config: ServerConfig, progress: Progress) -> Loaded:
        progress(0, 2)
        progress(2, 2)
        return loaded(engine, **options)

    return load
