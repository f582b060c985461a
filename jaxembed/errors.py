"""The tree of failures.

JaxembedError
├── InputError (ValueError)          the caller's texts, token ids or options
│   ├── InputTypeError                 an item of the wrong type
│   ├── InputTooLongError              more tokens than the model takes, truncation not asked
│   ├── TokenIdError                   a token id outside the vocabulary
│   ├── DimensionsError                a number of dimensions the model does not allow
│   ├── PromptNameError                no such prompt
│   └── TaskNameError                  no such task or route
├── CheckpointError                  what stands on disk
│   ├── CheckpointNotFoundError        no folder, package, cache entry or hub repository
│   ├── PickledCheckpointError         weights only as a pickle, which may run code
│   ├── CorruptCheckpointError         a file that is cut short or no valid safetensors/JSON
│   ├── WeightsError                   weights missing, left over, misshapen or not finite
│   └── UnsupportedModelError          an architecture, module or option that is not implemented
├── BucketError                      a shape outside the ladder, or one not compiled
├── CompileError                     buckets whose compilation failed
├── WrongNumbersError                this jaxlib miscomputes; refuse to serve
└── NonFiniteError                   NaN or Inf in a vector

Every message names what was given and what is allowed. Nothing here knows of HTTP.
"""

from collections.abc import Mapping, Sequence

__all__ = [
    "BucketError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CompileError",
    "CorruptCheckpointError",
    "DimensionsError",
    "InputError",
    "InputTooLongError",
    "InputTypeError",
    "JaxembedError",
    "NonFiniteError",
    "PickledCheckpointError",
    "PromptNameError",
    "TaskNameError",
    "TokenIdError",
    "UnsupportedModelError",
    "WeightsError",
    "WrongNumbersError",
]


class JaxembedError(Exception):
    """Everything this project raises on purpose."""


class InputError(JaxembedError, ValueError):
    """The caller's input or options are not acceptable.

    Attributes:
        index: which item of the input, counted from 0; None when it is not about one item.
    """

    def __init__(self, message: str, *, index: int | None = None) -> None:
        super().__init__(message)
        self.index = index


class InputTypeError(InputError):
    """An item is neither a string nor a list of token ids."""


class InputTooLongError(InputError):
    """An item has more tokens than the model takes and truncation was not asked."""

    def __init__(self, *, index: int, length: int, limit: int) -> None:
        super().__init__(
            f"input[{index}] has {length} tokens, but this model takes at most {limit}; shorten it or ask to truncate",
            index=index,
        )
        self.length = length
        self.limit = limit


class TokenIdError(InputError):
    """A token id is outside the model's vocabulary.

    Attributes:
        position: which token of the item, counted from 0.
    """

    def __init__(self, *, index: int, position: int, value: int, vocab_size: int) -> None:
        super().__init__(
            f"input[{index}][{position}] is the token id {value}, but this model's ids are 0 to {vocab_size - 1}",
            index=index,
        )
        self.position = position


class DimensionsError(InputError):
    """The asked number of dimensions is not one this model gives.

    Attributes:
        supported: False when the model allows no number but its own.
    """

    def __init__(self, message: str, *, supported: bool = True) -> None:
        super().__init__(message)
        self.supported = supported


class PromptNameError(InputError):
    """The model has no prompt of this name."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        allowed = ", ".join(repr(k) for k in known) if known else "this model has no prompts"
        super().__init__(f"unknown prompt name {name!r}; known: {allowed}")


class TaskNameError(InputError):
    """The model has no task, or route, of this name."""

    def __init__(self, name: str | None, known: Sequence[str]) -> None:
        given = "a task must be named" if name is None else f"unknown task {name!r}"
        allowed = ", ".join(repr(k) for k in known) if known else "this model has no tasks"
        super().__init__(f"{given}; known: {allowed}")


class CheckpointError(JaxembedError):
    """The checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError):
    """Nothing of this name in any place that was looked at; the message lists them."""


class PickledCheckpointError(CheckpointError):
    """The weights are only there as a pickle, and loading a pickle may run code."""


class CorruptCheckpointError(CheckpointError):
    """A file of the checkpoint is cut short or malformed."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint asks for something that is not implemented; the message names it."""


class WeightsError(CheckpointError):
    """Model and checkpoint do not cover each other. One error lists everything that is wrong."""

    def __init__(self, where: str, problems: Mapping[str, Sequence[str]]) -> None:
        lines = [f"the weights in {where} do not fit the model:"]
        for title, entries in problems.items():
            lines += [f"  {title} ({len(entries)}):", *(f"    {entry}" for entry in entries)]
        super().__init__("\n".join(lines))
        self.problems = {title: tuple(entries) for title, entries in problems.items()}


class BucketError(JaxembedError):
    """A shape that the ladder does not hold, or that was never compiled."""


class CompileError(JaxembedError):
    """Some buckets failed to compile. The message names each with its cause."""

    def __init__(self, failures: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"bucket {bucket}: {cause}" for bucket, cause in failures.items()))
        self.failures = dict(failures)


class WrongNumbersError(JaxembedError):
    """This jaxlib returns wrong numbers on this machine."""


class NonFiniteError(JaxembedError):
    """A vector holds NaN or Inf.

    Attributes:
        indices: the items concerned, counted from 0.
    """

    def __init__(self, indices: Sequence[int]) -> None:
        shown = ", ".join(str(i) for i in indices[:8]) + (", ..." if len(indices) > 8 else "")
        super().__init__(f"the model returned NaN or Inf for input {shown}")
        self.indices = tuple(indices)
