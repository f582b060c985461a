"""Values that travel between the floors: frozen, numpy only. Knows neither text nor JAX."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "NO_TASK",
    "Architecture",
    "Batch",
    "Bucket",
    "Column",
    "Encoding",
    "Layout",
    "Pooling",
    "PoolingMode",
    "Weight",
    "Weights",
]

Int32 = npt.NDArray[np.int32]

Table = TypeVar("Table", bound=Any)

NO_TASK = -1
"""A row that asks for none of the architecture's tasks."""

FILL_MASK = "fill-mask"
SEQUENCE_CLASSIFICATION = "sequence-classification"
"""Hugging Face's names of the tasks that an encoder may have a head for."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """One tokenised input.

    Attributes:
        ids: token ids, int32 [T], special tokens included.
        prompt_length: leading tokens that pooling leaves out (0 unless the model says `include_prompt: false`).
        second_start: where the second text of a pair begins; 0 where there is only one.
        task: which of the model's tasks it asks for; `NO_TASK` for none.
        attended: how many of the ids, the first ones, attention sees; None: all. The others see those, and have
            outputs of their own (ColBERT's query expansion).
    """

    ids: Int32
    prompt_length: int = 0
    second_start: int = 0
    task: int = NO_TASK
    attended: int | None = None

    def __len__(self) -> int:
        return len(self.ids)


class Bucket(NamedTuple):
    """A shape that is compiled ahead: at most `batch_size` rows of at most `seq_len` tokens.

    Padded, each row is filled up to `seq_len`. Flat, they stand one right behind another (`tokens.Rows`), and what is
    behind the last one is filled up.

    Attributes:
        batch_size: B.
        seq_len: T.
        flat: of a flat shape N, the tokens of all rows together; 0 for a padded one.
    """

    batch_size: int
    seq_len: int
    flat: int = 0

    @property
    def tokens(self) -> int:
        """Tokens the device computes for this shape, padding included."""
        return self.flat or self.places

    @property
    def places(self) -> int:
        """Places of tokens in the rows as attention lays them out."""
        return self.batch_size * self.seq_len

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.seq_len}" + (f"/{self.flat}" if self.flat else "")


class Column(IntEnum):
    """What a Batch says of each row beside its token ids, and where."""

    LENGTH = 0
    """Tokens that attention sees; 0 for a row of padding."""
    PROMPT_LENGTH = 1
    """Leading tokens that pooling leaves out."""
    DIMENSIONS = 2
    """Matryoshka size."""
    NORMALIZE = 3
    """1: L2-normalise this row."""
    SECOND_START = 4
    """Where the second text of a pair begins; 0 where there is only one."""
    TASK = 5
    """Which of the architecture's tasks it asks for; `NO_TASK` for none."""
    TOKENS = 6
    """Tokens of the row, whether attention sees them or not; 0 for a row of padding."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one executable is called with. B = bucket.batch_size, T = bucket.seq_len; the first n rows are real.

    Attributes:
        bucket: the shape.
        table: int32 [B, C + T], for each row the C numbers of `Column`, then its token ids, right-padded; of a flat
            shape [1, B * C + N], first those numbers of all rows, then the token ids of all. One array, since each is a
            way of its own to an accelerator.
        owners: int64 [n], which item of the planned queue each real row belongs to.
    """

    bucket: Bucket
    table: Int32
    owners: npt.NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Real rows, n."""
        return len(self.owners)

    @property
    def told(self) -> Int32:
        """int32 [B, C], a part of the table."""
        return told(self.bucket, self.table)

    @property
    def input_ids(self) -> Int32:
        """int32 [B, T], or [1, N] of a flat shape, a part of the table."""
        return input_ids(self.bucket, self.table)

    def column(self, which: Column) -> Int32:
        """int32 [B], a part of the table."""
        return self.told[:, which]


def told(bucket: Bucket, table: Table) -> Table:
    """`Batch.told`, of an array of numpy's or JAX's."""
    rows: Table = table[0, : -bucket.flat].reshape(bucket.batch_size, -1) if bucket.flat else table[:, : len(Column)]
    return rows


def input_ids(bucket: Bucket, table: Table) -> Table:
    """`Batch.input_ids`, of an array of numpy's or JAX's."""
    ids: Table = table[:, -bucket.flat if bucket.flat else len(Column) :]
    return ids


class Output(StrEnum):
    """What an executable gives of each row."""

    DENSE = "dense"
    """One vector: [B, D]."""
    TOKENS = "tokens"
    """A vector for each token: [B, T, D]."""
    SPARSE = "sparse"
    """A weight for each entry of the vocabulary, most of them 0: [B, V]."""
    SCORES = "scores"
    """A number for each label: [B, L]."""


class PoolingMode(StrEnum):
    """How token vectors become one vector; the names are sentence-transformers'."""

    CLS = "cls"
    MAX = "max"
    MEAN = "mean"
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"
    WEIGHTED_MEAN = "weightedmean"
    LAST_TOKEN = "lasttoken"


@dataclass(frozen=True)
class Pooling:
    """The pooling module of a checkpoint: its modes are concatenated in this order."""

    modes: tuple[PoolingMode, ...] = (PoolingMode.MEAN,)
    include_prompt: bool = True


@dataclass(frozen=True)
class SpladePooling:
    """Logits over the vocabulary for each token -> one weight for each entry (https://arxiv.org/abs/2109.10086).

    Attributes:
        strategy: over the tokens, "max" or "sum".
        twice: log1p(log1p(relu(x))) in place of log1p(relu(x)) (https://arxiv.org/abs/2504.14839).
    """

    strategy: str = "max"
    twice: bool = False


class Layout(StrEnum):
    """How a checkpoint stores an array, against how we hold it."""

    SAME = "same"
    TRANSPOSED = "transposed"
    """The last two axes change places: adapters [rank, in] and [out, rank] are held the other way round."""


class Weight(NamedTuple):
    """Where a parameter of ours stands in a checkpoint.

    Attributes:
        name: the checkpoint's name; `{n}` in it is the layer's number.
        layout: how it is stored.
        part: (i, k): ours is the i-th of k equal parts of what is stored, along its first axis, as where queries,
            keys and values are one matrix.
    """

    name: str
    layout: Layout = Layout.SAME
    part: tuple[int, int] = (0, 1)


Weights = Mapping[str, Weight]
"""Our parameter path, with `{n}` for the layer's number -> where the checkpoint keeps it."""


def no_tasks(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What an architecture without task adapters says."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Names:
    """Under which names a checkpoint keeps the parameters of a module.

    Attributes:
        weights: our parameter path with `{n}` -> where the checkpoint keeps it.
        alternatives: other tables of the same, as where a hub original and transformers' port name and fuse their
            matrices differently. The table that fits a checkpoint best is used.
        ignored: patterns (regular expressions, whole name) of checkpoint keys that are rightly left over.
        prefixes: what may stand before every name, as when the encoder was saved inside a larger model.
        renames: (pattern, replacement) applied to checkpoint keys first: names of older savers.
    """

    weights: Weights
    alternatives: tuple[Weights, ...] = ()
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    renames: tuple[tuple[str, str], ...] = field(default=())

    @property
    def where(self) -> str:
        """For messages: where the table stands."""
        return "a module"


@dataclass(frozen=True, kw_only=True)
class Head(Names):
    """What stands on an encoder's hidden states for another task than vectors; its names stand beside the encoder's.

    Attributes:
        build: (the encoder's Config, config.json, matmul dtype name) -> the NNX module. For "sequence-classification"
            it maps (hidden [B, T, D], mask [B, T]) to logits [B, L]; for "fill-mask" (hidden [B, T, D], the encoder,
            whose word table it may share) to logits [B, T, V].
        own_table: the path of the table that it holds only where it does not share the encoder's.
    """

    build: Callable[[Any, Mapping[str, Any], str], Any]
    own_table: str | None = None

    def fitted(self, config: Mapping[str, Any], stored: Container[str]) -> Mapping[str, Any]:
        """config.json, corrected by what a checkpoint holds: a table that is stored is never shared, whatever it says.

        Args:
            config: config.json, whose `tie_word_embeddings` says whether the word table is shared.
            stored: names in the checkpoint.
        """
        own = self.own_table is not None and self.weights[self.own_table].name in stored
        return {**config, "tie_word_embeddings": False} if own else config


@dataclass(frozen=True, kw_only=True)
class Architecture(Names):
    """Everything the loader must know of one kind of model. Each file in `models/` makes one.

    Attributes:
        model_type: Hugging Face's name in config.json.
        config: config.json as a dict -> this architecture's Config; raises UnsupportedModelError.
        build: (Config, matmul dtype name) -> the NNX module, with `hidden_states(tokens)`.
        tasks: (config.json) -> names of the tasks among which each row may choose, as of task adapters.
        heads: task (`SEQUENCE_CLASSIFICATION`, `FILL_MASK`) -> its head.
        default_length: tokens an input may have where neither the checkpoint nor the positions say.
        sparse: whether its module gives weights over the vocabulary, `sparse(tokens)` [B, V], and no hidden states.
    """

    model_type: str
    config: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, str], Any]
    tasks: Callable[[Mapping[str, Any]], Sequence[str]] = field(default=no_tasks)
    heads: Mapping[str, Head] = field(default_factory=dict)
    default_length: int = 512
    sparse: bool = False

    def with_head(self, head: Head, config: Mapping[str, Any]) -> "Architecture":
        """The same whose module holds a head's module as `head`.

        Args:
            head: one of `heads`.
            config: config.json.
        """

        def build(read: Any, dtype: str) -> Any:
            module = self.build(read, dtype)
            module.head = head.build(read, config, dtype)
            return module

        heads = [
            {f"head.{path}": weight for path, weight in table.items()} for table in (head.weights, *head.alternatives)
        ]
        first, *others = ({**table, **beside} for table in (self.weights, *self.alternatives) for beside in heads)
        # What the encoder alone may leave over is the head's own now: of its names none may be missing or unknown.
        own = [weight.name for table in heads for weight in table.values()]
        ignored = [pattern for pattern in self.ignored if not any(re.fullmatch(pattern, name) for name in own)]
        return replace(
            self,
            build=build,
            weights=first,
            alternatives=tuple(others),
            ignored=(*ignored, *head.ignored),
            renames=(*self.renames, *head.renames),
        )

    @property
    def where(self) -> str:
        """For messages: where the table stands."""
        return f"models/{self.model_type}"
