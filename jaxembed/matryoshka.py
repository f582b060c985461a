"""Which sizes a model's vectors may be cut to: the policy of the API's `dimensions`. Does not cut anything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jaxembed.errors import DimensionsError

__all__ = ["UNDECLARED", "Matryoshka", "Policy"]


class Policy(StrEnum):
    """What to do about a size that the model neither declares nor is known to be trained for."""

    STRICT = "strict"
    WARN = "warn"
    OFF = "off"


ANY: tuple[int, ...] = ()

UNDECLARED: Mapping[str, tuple[int, ...]] = {
    "Qwen/Qwen3-Embedding-0.6B": ANY,
    "Qwen/Qwen3-Embedding-4B": ANY,
    "Qwen/Qwen3-Embedding-8B": ANY,
    "google/embeddinggemma-300m": (768, 512, 256, 128),
    "nomic-ai/nomic-embed-text-v1.5": (768, 512, 256, 128, 64),
    "nomic-ai/nomic-embed-text-v2-moe": (768, 256),
    "mixedbread-ai/mxbai-embed-large-v1": ANY,
    "Alibaba-NLP/gte-multilingual-base": ANY,
    "nomic-ai/modernbert-embed-base": (768, 256),
    "sentence-transformers/static-retrieval-mrl-en-v1": ANY,
    "sentence-transformers/static-similarity-mrl-multilingual-v1": ANY,
    "minishlab/potion-base-2M": ANY,
    "minishlab/potion-base-4M": ANY,
    "minishlab/potion-base-8M": ANY,
    "minishlab/potion-base-32M": ANY,
    "minishlab/potion-multilingual-128M": ANY,
    "minishlab/potion-retrieval-32M": ANY,
}
"""Models trained with a matryoshka loss whose config.json does not say so; () means every size."""


@dataclass(frozen=True)
class Matryoshka:
    """The sizes a model allows.

    Attributes:
        native: the full size D; always allowed.
        sizes: the other sizes allowed; () with `trained` means every size from 1 to D.
        trained: whether the model is known to be trained for smaller sizes at all.
        policy: `strict` refuses the rest, `warn` and `off` let every size from 1 to D through.
    """

    native: int
    sizes: tuple[int, ...] = ()
    trained: bool = False
    policy: Policy = Policy.STRICT

    @classmethod
    def of(
        cls,
        name: str,
        config: Mapping[str, Any],
        native: int,
        *,
        policy: Policy = Policy.STRICT,
        override: Sequence[int] | None = None,
    ) -> "Matryoshka":
        """Read a model's sizes: the operator's `override`, else config.json, else the table of the undeclared.

        Args:
            name: hub id, to look up in the table.
            config: config.json.
            native: D.
            policy: see the class.
            override: sizes declared by the operator; an empty list declares every size.
        """
        if override is not None:
            return cls(native, tuple(sorted(override)), True, policy)
        declared = config.get("matryoshka_dimensions")
        if isinstance(declared, (list, tuple)) and declared:
            return cls(native, tuple(sorted(int(n) for n in declared)), True, policy)
        if config.get("is_matryoshka"):
            return cls(native, (), True, policy)
        if name in UNDECLARED:
            return cls(native, tuple(sorted(UNDECLARED[name])), True, policy)
        return cls(native, (), False, policy)

    def check(self, dimensions: int) -> bool:
        """Whether a size is allowed.

        Returns:
            True if the model is trained for this size (or it is the native one), False if only the policy lets it
            through: worth a warning.

        Raises:
            DimensionsError: the size is not allowed; the message lists what is.
        """
        if dimensions == self.native:
            return True
        if not self.trained and self.policy is Policy.STRICT:
            raise DimensionsError(
                f"dimensions is {dimensions}, but this model was not trained with matryoshka representation: "
                f"it gives {self.native} dimensions only",
                supported=False,
            )
        if not 1 <= dimensions <= self.native:
            raise DimensionsError(f"dimensions is {dimensions}; allowed: {self._allowed()}")
        if self.trained and (not self.sizes or dimensions in self.sizes):
            return True
        if self.policy is Policy.STRICT:
            raise DimensionsError(f"dimensions is {dimensions}; allowed: {self._allowed()}")
        return False

    def _allowed(self) -> str:
        if self.sizes and self.policy is Policy.STRICT:
            return ", ".join(map(str, sorted({*self.sizes, self.native})))
        return f"1 to {self.native}"
