"""Values that travel between the floors: frozen, numpy only. Knows neither text nor JAX."""

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = [
    "NO_TASK",
    "Batch",
    "Bucket",
    "Column",
    "Encoding",
    "Output",
    "Pooling",
    "PoolingMode",
    "SpladePooling",
    "input_ids",
    "told",
]

Int32 = npt.NDArray[np.int32]

Table = TypeVar("Table", bound=Any)

NO_TASK = -1
"""A row that asks for none of the architecture's tasks."""


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
        """Tokens that there is room for: what the device computes, unless it counts those that there are."""
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
