"""Text or token ids -> Encodings: prompts, special tokens and the length policy. Knows no model and no JAX."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxembed.errors import (
    InputError,
    InputTooLongError,
    InputTypeError,
    TokenIdError,
)
from jaxembed.pairs import kept_of_pair, second_start
from jaxembed.tokenizer_files import around, lower, mark, read_tokenizer, read_tokenizer_json, unknown_id
from jaxembed.types import NO_TASK, Encoding

__all__ = ["TokenIds", "Tokenizer", "TruncationSide"]

ALONE = 512
"""One text of no more characters is tokenised where the call comes from: a batch goes to the tokenizer's own threads
and back, which for a short text may take longer than the work, but lets Python's other threads run meanwhile."""

TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


PLAIN = ("vocab_size", "max_length", "measure_prompts", "bare", "typed", "left_out", "roles", "left_padded")
"""What of a tokenizer another process is told as it is."""


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
        typed: tell the two texts of a pair apart by type, where the tokenizer's template does.
        left_out: an id that is taken out of every text: model2vec's unknown token.
        side: which end is cut where a caller does not say.
        roles: transformers' names of special tokens, such as "mask_token" -> ids.
        left_padded: whether transformers would pad on the left. Nothing is padded here.
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
        typed: bool = True,
        left_out: int | None = None,
        side: TruncationSide = TruncationSide.RIGHT,
        roles: Mapping[str, int] | None = None,
        left_padded: bool = False,
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special_ids = special_ids
        self.vocab_size = vocab_size
        self.max_length = max_length
        self._measure_prompts = measure_prompts
        self._bare = bare
        self._typed = typed
        self._left_out = left_out
        self.side = side
        self.roles = roles or {}
        self.left_padded = left_padded
        self._prefix, self._suffix = (0, 0) if bare else around(backend)
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
        unknown: bool = True,
        markers: Sequence[str] = (),
    ) -> "Tokenizer":
        """Load the tokenizer of a checkpoint as transformers does.

        Args:
            folder: the checkpoint's.
            vocab_size, max_length, measure_prompts, bare: see the class. The folder of a bare one holds tokenizer.json
                and maybe nothing else.
            lowercase: lowercase every text first (sentence-transformers' `do_lower_case`).
            unknown: keep the token for what the vocabulary lacks.
            markers: texts that are one token wherever they stand, they or their first words, if the vocabulary has it.

        Raises:
            CorruptCheckpointError: the folder has no usable tokenizer files.
            UnsupportedModelError: its tokenizer is not one of the tokenizers package's, or cannot be made one here.
        """
        found = read_tokenizer_json(folder) if bare else read_tokenizer(folder)
        if lowercase:
            lower(found.backend)
        mark(found.backend, markers)
        return cls(
            found.backend,
            special_ids=found.special_ids,
            vocab_size=vocab_size,
            max_length=max_length,
            measure_prompts=measure_prompts,
            bare=bare,
            typed=found.typed,
            left_out=None if unknown else unknown_id(found.backend),
            side=TruncationSide(found.side),
            roles=found.roles,
            left_padded=found.left_padded,
        )

    def description(self) -> dict[str, Any]:
        """All of it as strings, numbers and lists, for `from_description` in another process."""
        return {
            "backend": self._backend.to_str(),
            "special_ids": sorted(self._special_ids),
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "measure_prompts": self._measure_prompts,
            "bare": self._bare,
            "typed": self._typed,
            "left_out": self._left_out,
            "side": self.side.value,
            "roles": dict(self.roles),
            "left_padded": self.left_padded,
        }

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> "Tokenizer":
        """The same tokenizer as the one that gave the `description`."""
        from tokenizers import Tokenizer as Backend

        return cls(
            Backend.from_str(description["backend"]),
            special_ids=frozenset(description["special_ids"]),
            side=TruncationSide(description["side"]),
            **{name: description[name] for name in PLAIN},
        )

    def token_id(self, token: str) -> int | None:
        """The id of a token of the vocabulary; None where there is no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found

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
        side: TruncationSide | None = None,
        task: int = NO_TASK,
    ) -> list[Encoding]:
        """Tokenise texts, `prompt` put before each.

        Args:
            texts: n strings.
            prompt: text to put before each; "" for none.
            add_special_tokens: put the model's special tokens around each text.
            truncate_to: cut to this many tokens, special tokens counted and kept; None refuses over-long texts.
            side: which end is cut; by default the one that the tokenizer's files name.
            task: `Encoding.task` of each.

        Returns:
            n Encodings, in order.

        Raises:
            InputTooLongError: a text has more tokens than the model takes and `truncate_to` is None.
            InputTypeError: an item is not a string that can be written as UTF-8.
            TokenIdError: the tokenizer has a token that the model has no vector for.
            InputError: `truncate_to` is out of range.
        """
        self._check_truncation(truncate_to)
        side = side or self.side
        add_special_tokens = add_special_tokens and not self._bare
        if not all(isinstance(text, str) for text in texts):
            raise unreadable(texts)
        prepared = [prompt + text if prompt else text for text in texts]
        try:
            if len(prepared) == 1 and len(prepared[0]) <= ALONE:
                encoded = [self._backend.encode(prepared[0], add_special_tokens=add_special_tokens)]
            else:
                encoded = self._backend.encode_batch_fast(prepared, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError):
            raise unreadable(texts) from None
        prompt_length = 0
        if prompt and self._measure_prompts:
            # A cut on the right may cut the prompt itself; one on the left is reckoned with below.
            limit = (truncate_to or self.max_length) if side is TruncationSide.RIGHT else None
            prompt_length = self._prompt_length(prompt, add_special_tokens, limit)
        prefix, suffix = (self._prefix, self._suffix) if add_special_tokens else (0, 0)
        found = self._ids(encoded)
        if (
            not prompt_length
            and self._left_out is None
            and max(map(len, found), default=0) <= (truncate_to or self.max_length)
        ):
            # As most are: nothing to cut, nothing to leave out.
            return [Encoding(ids, task=task) for ids in found]
        encodings = []
        for index, whole in enumerate(found):
            ids = self._fit(whole, index, truncate_to, side, prefix, suffix)
            # A cut on the left takes the prompt's tokens first, after the leading special ones.
            gone = len(whole) - len(ids) if side is TruncationSide.LEFT else 0
            left = max(prompt_length - gone, min(prefix, prompt_length))
            if self._left_out is not None:
                ids = ids[ids != self._left_out]
            encodings.append(Encoding(ids, min(left, len(ids)), task=task))
        return encodings

    def encode_pairs(
        self, pairs: Sequence[Sequence[str]], *, prompt: str = "", truncate_to: int | None = None
    ) -> list[Encoding]:
        """Tokenise pairs of texts, each into one Encoding, as the tokenizer's template for pairs says.

        Args:
            pairs: n times two strings.
            prompt: text to put before the first of each; "" for none.
            truncate_to: cut to this many tokens, special tokens counted and kept: the longer text first, until both are
                of a length, at the end that the tokenizer's files name; None refuses over-long pairs.

        Returns:
            n Encodings, in order.

        Raises:
            InputTooLongError: a pair has more tokens than the model takes and `truncate_to` is None.
            InputTypeError: an item is no pair of strings that can be written as UTF-8.
            TokenIdError: the tokenizer has a token that the model has no vector for.
            InputError: `truncate_to` is out of range.
            UnsupportedModelError: the template gives tokens other types than 0, and behind them 1.
        """
        self._check_truncation(truncate_to)
        for index, pair in enumerate(pairs):
            if isinstance(pair, str) or not isinstance(pair, Sequence):
                raise InputTypeError(
                    f"input[{index}] must be a pair of strings, not {type(pair).__name__}", index=index
                )
            if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
                given = ", ".join(type(text).__name__ for text in pair) or "nothing"
                raise InputTypeError(f"input[{index}] must be a pair of strings, not of {given}", index=index)
        prepared = [(prompt + first, second) for first, second in pairs]
        try:
            encoded = self._backend.encode_batch_fast(prepared)
        except (TypeError, UnicodeEncodeError):
            raise unreadable([first + second for first, second in pairs]) from None
        encodings = []
        for index, one in enumerate(encoded):
            ids, types = np.array(one.ids, np.int32), np.array(one.type_ids, np.int32)
            self._check_range(ids, index)
            if truncate_to is None:
                self._fit(ids, index, None, self.side, 0, 0)
            elif len(ids) > truncate_to:
                kept = kept_of_pair(one.sequence_ids, truncate_to, left=self.side is TruncationSide.LEFT)
                ids, types = ids[kept], types[kept]
            encodings.append(Encoding(ids, second_start=second_start(types) if self._typed else 0))
        return encodings

    def encode_ids(
        self,
        inputs: Sequence[TokenIds],
        *,
        truncate_to: int | None = None,
        side: TruncationSide | None = None,
        task: int = NO_TASK,
    ) -> list[Encoding]:
        """Take token ids exactly as given: no special tokens are added, and a cut is a plain slice.

        Args:
            inputs: n sequences of token ids.
            truncate_to: cut to this many tokens; None refuses over-long inputs.
            side: which end is cut; by default the one that the tokenizer's files name.
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
        side = side or self.side
        return [
            Encoding(self._fit(self._check_ids(ids, index), index, truncate_to, side, 0, 0), task=task)
            for index, ids in enumerate(inputs)
        ]

    def token(self, number: int) -> str:
        """The token of an id; "" where the tokenizer has none."""
        return self._backend.id_to_token(number) or ""

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
        self._check_range(ids, index)
        return np.asarray(ids).astype(np.int32)

    def _ids(self, encoded: Sequence[Any]) -> list[npt.NDArray[np.int32]]:
        """The ids of each of the backend's encodings, checked: as parts of one array, which costs less than arrays."""
        each = [one.ids for one in encoded]
        ends = list(accumulate(map(len, each)))
        flat = np.fromiter(chain.from_iterable(each), np.int32, ends[-1] if ends else 0)
        found = [flat[end - len(ids) : end] for ids, end in zip(each, ends, strict=True)]
        if len(flat) and flat.max() >= self.vocab_size:
            for index, ids in enumerate(found):
                self._check_range(ids, index)
        return found

    def _check_range(self, ids: TokenIds, index: int) -> None:
        if not len(ids):
            return
        # Python's own go through an array number by number, and this is on the way of every text.
        least, most = (ids.min(), ids.max()) if isinstance(ids, np.ndarray) else (min(ids), max(ids))
        if least < 0 or most >= self.vocab_size:
            bad = next(i for i, value in enumerate(ids) if not 0 <= value < self.vocab_size)
            raise TokenIdError(index=index, position=bad, value=int(ids[bad]), vocab_size=self.vocab_size)

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
