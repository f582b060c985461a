"""Pairs of texts in one row of tokens: which tokens stay when it is cut, and where the second text begins.

Knows no tokenizer: it sees what one has made.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from jaxembed.errors import UnsupportedModelError

__all__ = ["kept_of_pair", "second_start"]


def kept_of_pair(texts: Sequence[int | None], length: int, *, left: bool = False) -> npt.NDArray[np.bool_]:
    """Which tokens of a pair stay when it is cut, as "longest_first" of Hugging Face's tokenizers has it.

    Args:
        texts: for each token the text it is of, 0 or 1; None for a special one, which stays.
        length: tokens to keep, fewer than there are.
        left: whether each text is cut at its beginning.
    """
    of: npt.NDArray[np.int32] = np.array([-1 if text is None else text for text in texts], np.int32)
    places = np.arange(len(of))
    first, second = (int((of == text).sum()) for text in (0, 1))
    room = length - (len(of) - first - second)
    if room < 0:
        # Not even the special tokens fit: a plain slice.
        return places >= len(of) - length if left else places < length
    shorter = min(first, second, room // 2)
    # Of two texts that are both cut, the one that was longer keeps the odd token; of equals the second.
    limits = (room - shorter, shorter) if first > second else (shorter, room - shorter)
    kept = of < 0
    for text, limit in enumerate(limits):
        own = np.flatnonzero(of == text)
        kept[own[max(len(own) - limit, 0) :] if left else own[:limit]] = True
    return kept


def second_start(types: npt.NDArray[np.int32]) -> int:
    """Where the tokens of type 1 begin; 0 where there are none.

    Raises:
        UnsupportedModelError: there are others, or some of type 0 behind them, or none before them.
    """
    start = int(np.argmax(types)) if len(types) else 0
    first, second = types[: start or len(types)], types[start:]
    if first.any() or (start and (second != 1).any()):
        raise UnsupportedModelError(f"the tokenizer gives a pair the types {types.tolist()}; supported: 0s, then 1s")
    return start
