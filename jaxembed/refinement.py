"""A ladder from what really comes: shapes are timed, chosen (`shape_choice`), compiled and swapped in. Knows no JAX.

A small ladder is ready in seconds and pads much. Once enough inputs have been seen, the shapes are chosen again by
their lengths, compiled beside the work, and the ladder is swapped.
"""

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from jaxembed.buckets import Ladder
from jaxembed.cost import LEAST_CALL, Cost, fit_cost
from jaxembed.shape_choice import PRICE, choose_lengths, compared, fewest, flat_choices, loads
from jaxembed.shapes import flat_shape, padded_shapes
from jaxembed.types import Bucket

__all__ = ["Ahead", "Histogram", "Refinable", "least_seconds", "not_ahead", "price", "refine", "switch", "wide"]

SMALL = 4
"""Shapes of at most a full batch over this are timed before they are chosen: they keep least to the fit."""

WIDE_ROWS = 16
"""Rows of `wide`."""

ROUNDS = 3
"""How often a shape is timed."""

GAIN = 0.03
"""A new ladder must save this share of what inputs take by the old one, in the mean over `shape_choice.loads`. A shape
less is worth its price there."""


class Histogram:
    """How often each length has come. Safe to call from several threads.

    Args:
        max_length: the longest.
    """

    def __init__(self, max_length: int) -> None:
        # No array: most requests are of a text or two.
        self._counts = [0] * (max_length + 1)
        self._lock = threading.Lock()

    def add(self, lengths: Iterable[int]) -> None:
        """Count some inputs."""
        with self._lock:
            for length in lengths:
                self._counts[length] += 1

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """int64 [max_length + 1]: inputs of each length from 0 on."""
        with self._lock:
            return np.array(self._counts, np.int64)


@runtime_checkable
class Refinable(Protocol):
    """What refinement needs of an engine; see `jaxembed.engine.Engine`."""

    ladder: Ladder
    max_batch_tokens: int
    batch_multiple: int
    length_multiple: int
    flat: bool
    counted: bool

    def time(self, bucket: Bucket, *, filled: bool) -> float:
        """Seconds of one batch of a compiled shape, full or empty."""

    def allow(self, ladder: Ladder) -> None:
        """Let the shapes of a ladder be compiled."""

    def compile(self, bucket: Bucket) -> object:
        """Compile a shape; does nothing if it is ready."""

    def adopt(self, ladder: Ladder) -> None:
        """Plan by another ladder from now on."""


Ahead = Callable[[Ladder], None]
"""Told of a ladder whose shapes the engine is about to compile: they may be made ready elsewhere first."""


def not_ahead(ladder: Ladder) -> None:
    """All of them are compiled by the engine itself."""


def refine(engine: Refinable, counts: npt.NDArray[np.int64], ahead: Ahead = not_ahead) -> Ladder | None:
    """Choose shapes for inputs like these, compile them, and only then have the engine plan by them.

    The shapes that the engine has are timed first, and a fit to that says what others would take. Where there are flat
    ones, so is `wide`: the others say little of what places without a token cost. The small ones, which keep least to
    the fit, are chosen from again once they are compiled and timed. Where tokens are counted, shapes are timed full and
    empty, and chosen by the fits to both alone.

    Args:
        engine: its ladder must be compiled.
        counts: int64 [max_length + 1], inputs of each length.
        ahead: called before shapes are compiled, `wide` too.

    Returns:
        The new ladder; None if it would save less than `GAIN`, and the engine keeps its own.

    Raises:
        Exception: whatever a compilation raises; the engine keeps its ladder then.
    """
    old = engine.ladder
    within = counts[: old.max_length + 1]
    if not within.any():
        return None
    timed = old
    if engine.flat:
        timed = old.having({*old.buckets, wide(engine)})
        ahead(timed)
        prepare(engine, timed)
    cost = fitted(engine, least_seconds(engine, timed.buckets))
    likely = loads(within, engine.max_batch_tokens)
    first = fewest(priced(engine, candidates(engine, within, cost), cost), likely, cost.spent)
    fewer = PRICE * (len(old) - len(first))
    if compared(first, old, likely, cost.spent) - fewer > 1 - GAIN:
        return None
    ahead(first)
    prepare(engine, first)
    # Where tokens are counted all of them keep to the fit, and full batches say nothing of others.
    several = () if engine.counted else (*old.buckets, *first.buckets)
    small = {bucket for bucket in several if bucket.tokens * SMALL <= first.batch_tokens}
    # The others again too: the machine may have become faster or slower since.
    measured = least_seconds(engine, {*timed.buckets, *small})
    cost = fitted(engine, measured)
    new = fewest(
        priced(engine, {*old.buckets, *first.buckets}, cost),
        likely,
        lambda bucket, tokens: measured[bucket] if bucket in small else cost.spent(bucket, tokens),
    )
    switch(engine, new)
    return new


def price(engine: Refinable) -> Ladder:
    """Have an engine whose flat shapes count tokens plan its shapes by what they take.

    Returns:
        The same shapes with other prices.
    """
    buckets = engine.ladder.buckets
    ladder = priced(engine, buckets, fitted(engine, least_seconds(engine, buckets)))
    switch(engine, ladder)
    return ladder


def wide(engine: Refinable) -> Bucket:
    """A flat shape of many more places than tokens."""
    tokens = max(WIDE_ROWS, engine.max_batch_tokens // SMALL)
    length = min(tokens, engine.ladder.max_length)
    return flat_shape(WIDE_ROWS, length, min(tokens, WIDE_ROWS * length))


def priced(engine: Refinable, buckets: Iterable[Bucket], cost: Cost) -> Ladder:
    """A ladder that plans by what was measured, where that says how tokens and places compare."""
    prices = cost.in_tokens if engine.flat and cost.token + cost.real else engine.ladder.prices
    return Ladder(buckets, prices)


def candidates(engine: Refinable, counts: npt.NDArray[np.int64], cost: Cost) -> set[Bucket]:
    """Shapes for inputs like these, those that are there, and those to begin with, for what else may come."""
    most, multiple = engine.max_batch_tokens, engine.batch_multiple
    default = Ladder.default(
        max_length=engine.ladder.max_length,
        max_batch_tokens=most,
        batch_multiple=multiple,
        flat=engine.flat,
        counted=engine.counted,
    )
    if engine.flat:
        wanted = flat_choices(counts, cost, most, counted=engine.counted)
    else:
        lengths = choose_lengths(counts, cost.of_row, multiple=engine.length_multiple)
        wanted = padded_shapes(lengths, most, multiple=multiple)
    return {*wanted, *engine.ladder.buckets, *default.buckets}


def least_seconds(engine: Refinable, buckets: Iterable[Bucket], *, filled: bool = True) -> dict[Bucket, float]:
    """Shape -> seconds of a batch, full or empty, the least of several.

    All of them are timed in turns, so that other work in between strikes them alike.
    """
    found = dict.fromkeys(buckets, math.inf)
    for _ in range(ROUNDS):
        for bucket, least in found.items():
            found[bucket] = min(least, engine.time(bucket, filled=filled))
    return found


def fitted(engine: Refinable, measured: Mapping[Bucket, float]) -> Cost:
    """The cost that explains the times of full batches; where tokens are counted, of flat ones, and of empty ones.

    What an empty batch takes is for its shape: tokens that there is room for, and places that attention lays out. The
    call of a full one takes longer, since it has to read the weights; `LEAST_CALL` at least.
    """
    flat = {bucket: seconds for bucket, seconds in measured.items() if bucket.flat}
    if not engine.counted or not flat:
        return fit_cost(measured)
    full, empty = fit_cost(flat), fit_cost(least_seconds(engine, flat, filled=False))
    real = max(0.0, full.token - empty.token)
    return empty._replace(call=max(full.call, LEAST_CALL * (empty.token + real)), real=real)


def switch(engine: Refinable, ladder: Ladder) -> None:
    """Compile the shapes of a ladder, and only then have the engine plan by them.

    Raises:
        Exception: whatever a compilation raises; the engine keeps its ladder then.
    """
    prepare(engine, ladder)
    engine.adopt(ladder)


def prepare(engine: Refinable, ladder: Ladder) -> None:
    """Compile the shapes of a ladder; they stay for as long as it is referred to.

    Raises:
        Exception: whatever a compilation raises.
    """
    engine.allow(ladder)
    for bucket in ladder.buckets:
        engine.compile(bucket)
