"""Values that travel between the floors: frozen, numpy only. Knows neither text nor JAX."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Architecture", "Batch", "Bucket", "Encoding", "Layout", "Pooling", "PoolingMode", "Weight"]

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Encoding:
    """One tokenised input.

    Attributes:
        ids: token ids, int32 [T], special tokens included.
        prompt_length: leading tokens that pooling leaves out (0 unless the model says `include_prompt: false`).
    """

    ids: Int32
    prompt_length: int = 0

    def __len__(self) -> int:
        return len(self.ids)


class Bucket(NamedTuple):
    """A padded shape that is compiled ahead: `batch_size` rows of `seq_len` tokens."""

    batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Tokens the device computes for this shape, padding included."""
        return self.batch_size * self.seq_len

    def __str__(self) -> str:
        return f"{self.batch_size}x{self.seq_len}"


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What one executable is called with. B = bucket.batch_size, T = bucket.seq_len; the first n rows are real.

    Attributes:
        bucket: the shape.
        input_ids: int32 [B, T], right-padded.
        lengths: int32 [B], real tokens per row; 0 for a row of padding.
        prompt_lengths: int32 [B], leading tokens that pooling leaves out.
        dimensions: int32 [B], matryoshka size per row.
        normalize: bool [B], L2-normalise this row?
        owners: int64 [n], which item of the planned queue each real row belongs to.
    """

    bucket: Bucket
    input_ids: Int32
    lengths: Int32
    prompt_lengths: Int32
    dimensions: Int32
    normalize: npt.NDArray[np.bool_]
    owners: npt.NDArray[np.int64]

    @property
    def rows(self) -> int:
        """Real rows, n."""
        return len(self.owners)


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


class Layout(StrEnum):
    """How a checkpoint stores an array, against how we hold it."""

    SAME = "same"
    TRANSPOSED = "transposed"
    """torch.nn.Linear stores [out, in]; our kernels are [in, out]."""


class Weight(NamedTuple):
    """Where a parameter of ours stands in a checkpoint. `name` may hold `{n}`, the layer's number."""

    name: str
    layout: Layout = Layout.SAME


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything the loader must know of one kind of model. Each file in `models/` makes one.

    Attributes:
        model_type: Hugging Face's name in config.json.
        config: config.json as a dict -> this architecture's Config; raises UnsupportedModelError.
        build: (Config, matmul dtype name) -> the NNX module, with `hidden_states(input_ids, mask)`.
        weights: our parameter path with `{n}` -> where the checkpoint keeps it.
        ignored: patterns (regular expressions, whole name) of checkpoint keys that are rightly left over.
        prefixes: what may stand before every name, as when the encoder was saved inside a larger model.
        renames: (pattern, replacement) applied to checkpoint keys first: names of older savers.
    """

    model_type: str
    config: Callable[[Mapping[str, Any]], Any]
    build: Callable[[Any, str], Any]
    weights: Mapping[str, Weight]
    ignored: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ("",)
    renames: tuple[tuple[str, str], ...] = field(default=())
