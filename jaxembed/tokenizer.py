"""Text or token ids -> Encodings: prompts, special tokens and the length policy. Knows no model and no JAX."""

import logging
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxembed.errors import (
    CorruptCheckpointError,
    InputError,
    InputTooLongError,
    InputTypeError,
    TokenIdError,
)
from jaxembed.types import NO_TASK, Encoding

__all__ = ["TokenIds", "Tokenizer", "TruncationSide"]

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


class TruncationSide(StrEnum):
    """Which end a cut takes tokens from: `RIGHT` keeps the first ones, `LEFT` the last."""

    RIGHT = "right"
    LEFT = "left"


class Tokenizer:
    """A checkpoint's tokenizer with its length policy. Safe to call from several threads.

    Args:
        backend: a `tokenizers.Tokenizer`; its own padding and truncation are switched off.
        special_ids: ids that the tokenizer counts as special.
        vocab_size: rows of the model's embedding table: valid token ids are 0 to vocab_size - 1.
        max_length: tokens the model takes, special tokens included.
        measure_prompts: fill `Encoding.prompt_length` (the model's pooling says `include_prompt: false`).
        bare: put no special tokens around a text, whatever is asked for (static embeddings).
    """

    def __init__(
        self,
        backend: Any,
        *,
        special_ids: frozenset[int],
        vocab_size: int,
        max_length: int,
        measure_prompts: bool = False,
        bare: bool = False,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special_ids = special_ids
        self.vocab_size = vocab_size
        self.max_length = max_length
        self._measure_prompts = measure_prompts
        self._bare = bare
        mask = backend.encode("a", add_special_tokens=not bare).special_tokens_mask
        self._prefix = next((i for i, special in enumerate(mask) if not special), len(mask))
        self._suffix = next((i for i, special in enumerate(reversed(mask)) if not special), 0)
        self._prompt_length = lru_cache(maxsize=256)(self._count_prompt)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        *,
        vocab_size: int,
        max_length: int,
        lowercase: bool = False,
        measure_prompts: bool = False,
        bare: bool = False,
    ) -> "Tokenizer":
        """Load the tokenizer of a checkpoint as transformers does.

        Args:
            folder: the checkpoint's.
            vocab_size, max_length, measure_prompts, bare: see the class. The folder of a bare one holds tokenizer.json
                and maybe nothing else.
            lowercase: lowercase every text first (sentence-transformers' `do_lower_case`).

        Raises:
            CorruptCheckpointError: the folder has no usable tokenizer files.
        """
        # It warns at import that there is no torch, as if that were a fault.
        logging.getLogger("transformers").addFilter(not_about_torch)
        # Imported here: half a second that only a loaded model needs.
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        try:
            loaded: Any
            if bare:
                fast: Any = PreTrainedTokenizerFast
                loaded = fast(tokenizer_file=str(folder / "tokenizer.json"))
            else:
                loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # The tokenizers package raises no narrower class for a malformed file.
            raise CorruptCheckpointError(f"cannot load a tokenizer from {folder}: {error}") from error
        backend = loaded.backend_tokenizer
        if backend.get_vocab_size() <= len(loaded.all_special_ids):
            # What transformers makes of a folder without tokenizer files.
            raise CorruptCheckpointError(f"cannot load a tokenizer from {folder}: it has no vocabulary")
        if lowercase:
            lower(backend)
        return cls(
            backend,
            special_ids=frozenset(loaded.all_special_ids),
            vocab_size=vocab_size,
            max_length=max_length,
            measure_prompts=measure_prompts,
            bare=bare,
        )

    @property
    def special_tokens(self) -> int:
        """How many special tokens stand around a text."""
        return self._prefix + self._suffix

    def encode_texts(
        self,
        texts: Sequence[str],
        *,
        prompt: str = "",
        add_special_tokens: bool = True,
        truncate_to: int | None = None,
        side: TruncationSide = TruncationSide.RIGHT,
        task: int = NO_TASK,
    ) -> list[Encoding]:
        """Tokenise texts, `prompt` put before each.

        Args:
            texts: n strings.
            prompt: text to put before each; "" for none.
            add_special_tokens: put the model's special tokens around each text.
            truncate_to: cut to this many tokens, special tokens counted and kept; None refuses over-long texts.
            side: which end is cut.
            task: `Encoding.task` of each.

        Returns:
            n Encodings, in order.

        Raises:
            InputTooLongError: a text has more tokens than the model takes and `truncate_to` is None.
            InputTypeError: an item is not a string that can be written as UTF-8.
            InputError: `truncate_to` is out of range.
        """
        self._check_truncation(truncate_to)
        add_special_tokens = add_special_tokens and not self._bare
        if not all(isinstance(text, str) for text in texts):
            raise unreadable(texts)
        prepared = [prompt + text if prompt else text for text in texts]
        try:
            encoded = self._backend.encode_batch_fast(prepared, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise unreadable(texts) from None
        prompt_length = 0
        if prompt and self._measure_prompts:
            # A cut on the right may cut the prompt itself; one on the left is reckoned with below.
            limit = (truncate_to or self.max_length) if side is TruncationSide.RIGHT else None
            prompt_length = self._prompt_length(prompt, add_special_tokens, limit)
        prefix, suffix = (self._prefix, self._suffix) if add_special_tokens else (0, 0)
        encodings = []
        for index, one in enumerate(encoded):
            whole = np.array(one.ids, np.int32)
            ids = self._fit(whole, index, truncate_to, side, prefix, suffix)
            # A cut on the left takes the prompt's tokens first, after the leading special ones.
            gone = len(whole) - len(ids) if side is TruncationSide.LEFT else 0
            left = max(prompt_length - gone, min(prefix, prompt_length))
            encodings.append(Encoding(ids, min(left, len(ids)), task=task))
        return encodings

    def encode_ids(
        self,
        inputs: Sequence[TokenIds],
        *,
        truncate_to: int | None = None,
        side: TruncationSide = TruncationSide.RIGHT,
        task: int = NO_TASK,
    ) -> list[Encoding]:
        """Take token ids exactly as given: no special tokens are added, and a cut is a plain slice.

        Args:
            inputs: n sequences of token ids.
            truncate_to: cut to this many tokens; None refuses over-long inputs.
            side: which end is cut.
            task: `Encoding.task` of each.

        Returns:
            n Encodings, in order.

        Raises:
            TokenIdError: an id is outside 0 to vocab_size - 1.
            InputTooLongError: an input has more tokens than the model takes and `truncate_to` is None.
            InputTypeError: an item is not a sequence of integers.
            InputError: an item is empty, or `truncate_to` is out of range.
        """
        self._check_truncation(truncate_to)
        return [
            Encoding(self._fit(self._check_ids(ids, index), index, truncate_to, side, 0, 0), task=task)
            for index, ids in enumerate(inputs)
        ]

    def _check_truncation(self, truncate_to: int | None) -> None:
        if truncate_to is not None and not 1 <= truncate_to <= self.max_length:
            raise InputError(f"cannot truncate to {truncate_to} tokens; allowed: 1 to {self.max_length}")

    def _check_ids(self, ids: TokenIds, index: int) -> npt.NDArray[np.int32]:
        wrong = InputTypeError(f"input[{index}] must be a list of integers, the token ids", index=index)
        if isinstance(ids, np.ndarray):
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise wrong
        elif (
            not isinstance(ids, Sequence)
            or isinstance(ids, (bytes, bytearray))
            or not all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in set(map(type, ids)))
        ):
            raise wrong
        if not len(ids):
            raise InputError(f"input[{index}] is empty: it must hold at least one token id", index=index)
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            bad = next(i for i, value in enumerate(ids) if not 0 <= value < self.vocab_size)
            raise TokenIdError(index=index, position=bad, value=int(ids[bad]), vocab_size=self.vocab_size)
        return np.asarray(ids).astype(np.int32)

    def _fit(
        self,
        ids: npt.NDArray[np.int32],
        index: int,
        truncate_to: int | None,
        side: TruncationSide,
        prefix: int,
        suffix: int,
    ) -> npt.NDArray[np.int32]:
        """Apply the length policy; `prefix` and `suffix` count the special tokens that survive a cut."""
        length = len(ids)
        if truncate_to is None:
            if length > self.max_length:
                raise InputTooLongError(index=index, length=length, limit=self.max_length)
            return ids
        if length <= truncate_to:
            return ids
        keep = truncate_to - prefix - suffix
        if keep < 0:
            # Not even the special tokens fit: a plain slice, as for token ids.
            return ids[:truncate_to] if side is TruncationSide.RIGHT else ids[length - truncate_to :]
        content = ids[prefix : length - suffix]
        kept = content[:keep] if side is TruncationSide.RIGHT else content[len(content) - keep :]
        return np.concatenate([ids[:prefix], kept, ids[length - suffix :]])

    def _count_prompt(self, prompt: str, add_special_tokens: bool, limit: int | None) -> int:
        """Tokens of a prompt on its own, cut to `limit`, without a trailing special token: as sentence-transformers
        counts them."""
        ids = self._backend.encode(prompt, add_special_tokens=add_special_tokens).ids
        length = len(ids) if limit is None else min(len(ids), limit)
        return length - (1 if ids and ids[-1] in self._special_ids else 0)


def not_about_torch(record: logging.LogRecord) -> bool:
    """A logging filter; one object, because a logger keeps every other one that it is given."""
    return "PyTorch was not found" not in record.getMessage()


def lower(backend: Any) -> None:
    """Have a `tokenizers.Tokenizer` lowercase first, unless it does so already; special tokens stay as they are."""
    from tokenizers.normalizers import Lowercase
    from tokenizers.normalizers import Sequence as Chain

    own: Any = backend.normalizer
    chained = isinstance(own, Chain)
    steps: list[Any] = [] if own is None else [*own] if chained else [own]
    if not any(isinstance(step, Lowercase) or getattr(step, "lowercase", False) for step in steps):
        backend.normalizer = Chain([Lowercase(), *steps])


def unreadable(texts: Sequence[object]) -> InputTypeError:
    """The error that names the first item which is no string, or no string that UTF-8 can write."""
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return InputTypeError(f"input[{index}] must be a string, not {type(text).__name__}", index=index)
        try:
            text.encode()
        except UnicodeEncodeError:
            return InputTypeError(f"input[{index}] holds half of a surrogate pair: it is no valid text", index=index)
    return InputTypeError("the input cannot be tokenised")
