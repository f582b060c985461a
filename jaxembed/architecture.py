"""What a kind of model is to the loader: its entry in the registry, and the tables of names in a checkpoint. No JAX."""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, NamedTuple

__all__ = [
    "FILL_MASK",
    "SEQUENCE_CLASSIFICATION",
    "Architecture",
    "Head",
    "Layout",
    "Names",
    "Weight",
    "Weights",
]

FILL_MASK = "fill-mask"
SEQUENCE_CLASSIFICATION = "sequence-classification"
"""Hugging Face's names of the tasks that an encoder may have a head for."""


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
