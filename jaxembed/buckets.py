"""The ladder of compiled shapes: smallest fit, and planning a queue into batches. Knows no text and no device."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxembed.cost import COUNTED_PRICES, PRICES, Cost
from jaxembed.errors import BucketError
from jaxembed.shapes import default_flat_shapes, padded_shapes, rungs
from jaxembed.types import Bucket

__all__ = ["Ladder", "Plan"]

GAIN = 0.005
"""Runs that cost so little more than full batches would are taken as they are."""

SPARE = 0.05
"""A batch of rows of any length is full with so much room left, in parts of all."""


class Plan(NamedTuple):
    """One batch to be: a shape, and which items of the queue go into it, longest first."""

    bucket: Bucket
    items: tuple[int, ...]


class Ladder:
    """The set of shapes that are compiled ahead.

    Args:
        buckets: the shapes, in any order; at least one.
        prices: see below.

    Attributes:
        max_length: the longest sequence that fits, in tokens.
        batch_tokens: tokens of the largest shape of several rows, padding included; of the largest of all where none
            has several. A single row may be longer.
        max_rows: rows of the tallest shape.
        prices: what batches cost, in tokens of computation; an engine that plans by the ladder puts its own there.
        fullest: the flat shape whose tokens cost least, which rows of all lengths may fill; None if none is flat.

    Raises:
        BucketError: no buckets, one with a size under 1, or a flat one of more tokens than its rows hold.
    """

    def __init__(self, buckets: Iterable[Bucket], prices: Cost = PRICES) -> None:
        self.buckets = tuple(sorted(set(buckets), key=lambda b: (b.tokens, b.seq_len, b.batch_size)))
        if not self.buckets:
            raise BucketError("a ladder needs at least one bucket")
        if any(b.batch_size < 1 or b.seq_len < 1 for b in self.buckets):
            raise BucketError(f"a bucket needs a batch size and a length of at least 1: {self}")
        if any(b.flat and not b.seq_len <= b.flat <= b.places for b in self.buckets):
            raise BucketError(f"a flat bucket holds at least a row, and no more tokens than its rows: {self}")
        self.max_length = max(b.seq_len for b in self.buckets)
        several = [b.tokens for b in self.buckets if b.batch_size > 1]
        self.batch_tokens = max(several or [b.tokens for b in self.buckets])
        self.max_rows = max(b.batch_size for b in self.buckets)
        self.prices = prices

    @property
    def prices(self) -> Cost:
        """As told above."""
        return self._prices

    @prices.setter
    def prices(self, prices: Cost) -> None:
        self._prices = prices
        self._by_length: dict[int, tuple[Bucket, ...]] = {}
        self._costs = [(bucket, prices.of(bucket)) for bucket in self.buckets]
        flat = (bucket for bucket in self.buckets if bucket.flat)
        self.fullest = min(flat, key=lambda b: (prices.of(b) / b.flat, -b.seq_len, -b.batch_size), default=None)

    @classmethod
    def default(
        cls,
        *,
        max_length: int,
        max_batch_tokens: int,
        batch_multiple: int = 1,
        flat: bool = False,
        counted: bool = False,
    ) -> "Ladder":
        """Powers of two up to the model's length; per length the batch sizes 1, 4, 16, ... and the fullest.

        Args:
            max_length: the longest sequence, in tokens; always a rung of its own.
            max_batch_tokens: tokens a dispatch should hold, padding included. A single row of `max_length`
                is always allowed, even when it alone is more.
            batch_multiple: every batch size is a multiple of this (the number of devices on the data axis).
            flat: whether shapes of several rows are flat: per length of all, a quarter, a sixteenth, ... of
                `max_batch_tokens`; and one of full rows of `max_length`, padded. Only where `batch_multiple` is 1.
            counted: whether flat shapes compute the tokens that there are, and not those that there is room for: then
                fewer will do, and none but of very long rows is padded.

        Raises:
            BucketError: an argument under 1.
        """
        if min(max_length, max_batch_tokens, batch_multiple) < 1:
            raise BucketError(
                f"max_length={max_length}, max_batch_tokens={max_batch_tokens}, batch_multiple={batch_multiple}: "
                "each must be at least 1"
            )
        if not flat:
            return cls(padded_shapes(rungs(max_length), max_batch_tokens, multiple=batch_multiple))
        prices = COUNTED_PRICES if counted else PRICES
        return cls(default_flat_shapes(max_length, max_batch_tokens, counted=counted), prices)

    def smallest(self) -> "Ladder":
        """Of each length the shape with the fewest rows: they take whatever this ladder takes, and are ready first.

        Where tokens are counted, of those that are flat the smallest and the longest: between them it costs little that
        there is room for more.
        """
        found: dict[int, Bucket] = {}
        for bucket in self.buckets:
            # They stand in the order of their tokens.
            found.setdefault(bucket.seq_len, bucket)
        flat = [bucket for bucket in found.values() if bucket.flat]
        if not self.prices.real or not flat:
            return self.having(found.values())
        longest = max(flat, key=lambda bucket: bucket.seq_len)
        return self.having([flat[0], longest, *(bucket for bucket in found.values() if not bucket.flat)])

    def having(self, buckets: Iterable[Bucket]) -> "Ladder":
        """A ladder of other shapes at the same prices."""
        return Ladder(buckets, self.prices)

    def __str__(self) -> str:
        return "{" + ", ".join(map(str, self.buckets)) + "}"

    def __len__(self) -> int:
        return len(self.buckets)

    def outsize(self, bucket: Bucket) -> bool:
        """Whether a shape holds more than two batches of several rows together, as one of a single very long row may.

        Two of them at a time would take twice the memory, which grows with the square of the length. A row that is only
        a little longer than a batch, as 1x512 beside 3x168, is none.
        """
        return bucket.tokens > 2 * self.batch_tokens

    def fitting(self, length: int) -> tuple[Bucket, ...]:
        """The buckets for rows of up to `length` tokens, by batch size: no other one holds as much and costs no more.

        Raises:
            BucketError: no bucket is that long.
        """
        found = self._by_length.get(length)
        if found is None:
            if length > self.max_length:
                raise self._too_long(length)
            # What it costs, and less its rows and their tokens: what comes later must hold more.
            fits = sorted(
                (self.prices.of(bucket), -bucket.batch_size, -min(bucket.tokens, bucket.batch_size * length), bucket)
                for bucket in self.buckets
                if bucket.seq_len >= length
            )
            best: list[tuple[int, int, Bucket]] = []
            for _, rows, tokens, bucket in fits:
                if not any(held_rows <= rows and held <= tokens for held_rows, held, _ in best):
                    best.append((rows, tokens, bucket))
            found = tuple(sorted((bucket for *_, bucket in best), key=lambda b: (b.batch_size, b.tokens)))
            self._by_length[length] = found
        return found

    def plan(self, lengths: Sequence[int]) -> list[Plan]:
        """Put every item into exactly one batch at the least cost that is found.

        Either all in runs of rows sorted by length; or first in batches that rows of any length fill, and what does not
        fill one in runs.

        Args:
            lengths: tokens of each item.

        Returns:
            Plans whose items partition `range(len(lengths))`; each item fits its bucket.

        Raises:
            BucketError: an item is longer than the ladder.
        """
        runs = self._in_runs(lengths, range(len(lengths)))
        full = self.fullest
        if full is None or sum(lengths) * self.prices.of(full) * (1 + GAIN) >= self._spent(runs) * full.flat:
            return runs
        filled, left = filling(full, lengths)
        return min(runs, [*filled, *self._in_runs(lengths, left)], key=self._spent) if filled else runs

    def _spent(self, plans: Iterable[Plan]) -> float:
        return sum((self.prices.of(plan.bucket) for plan in plans), 0.0)

    def _in_runs(self, lengths: Sequence[int], items: Sequence[int]) -> list[Plan]:
        """The cheapest way for some of the items, where rows are sorted by length, longest first, and cut into runs.

        Found exactly by dynamic programming over the `prices` of batches, where each takes as many rows as there is
        room for.
        """
        n = len(items)
        if n == 0:
            return []
        order = sorted(items, key=lengths.__getitem__, reverse=True)
        # ends[room][i]: behind the last row that the i-th one and those after it leave room for in so many tokens.
        upto = np.cumsum([0, *(lengths[item] for item in order)])
        ends = {
            room: (np.searchsorted(upto, upto[:-1] + room, side="right") - 1).tolist()
            for room in {bucket.flat for bucket in self.buckets if bucket.flat}
        }
        anywhere = [n] * n
        # best[i]: least cost of placing the i-th row and all shorter ones; from the shortest upwards.
        best = [0.0] * (n + 1)
        choice: list[tuple[Bucket, int]] = [(self.buckets[0], n)] * n
        length, options = -1, []
        for i in range(n - 1, -1, -1):
            if lengths[order[i]] != length:
                length = lengths[order[i]]
                options = [
                    (bucket.batch_size, self.prices.of(bucket), ends.get(bucket.flat, anywhere), bucket)
                    for bucket in self.fitting(length)
                ]
            least = math.inf
            for rows, cost, last, bucket in options:
                end = min(i + rows, last[i])
                if cost + best[end] < least:
                    least, choice[i] = cost + best[end], (bucket, end)
            best[i] = least
        plans = []
        i = 0
        while i < n:
            bucket, end = choice[i]
            plans.append(Plan(bucket, tuple(order[i:end])))
            i = end
        return plans

    def first_batch(self, lengths: Sequence[int]) -> Plan:
        """The batch to run next: it holds item 0 and does the most real tokens for its cost.

        Rows nearest in length come first, and after them whatever still fits. For a queue whose other items may find
        better company: nothing is said about the rest.

        Args:
            lengths: tokens of each item, the most urgent first; at least one.

        Raises:
            BucketError: item 0 is longer than the ladder.
        """
        first = lengths[0]
        if first > self.max_length:
            raise self._too_long(first)
        others = np.array(lengths[1:], np.int64)
        # The nearest in length pad the least together, and leave the others to better company.
        nearest = np.argsort(np.abs(others - first), kind="stable")
        others = others[nearest]
        total = first + int(others.sum())
        # No shape does more than all there is, or than it holds.
        options = [(min(total, b.tokens) / cost, -b.seq_len, b, cost) for b, cost in self._costs if b.seq_len >= first]
        candidates: dict[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        best = (-1.0, 0)
        chosen, company = self.buckets[0], nearest
        for most, _, bucket, cost in sorted(options, reverse=True):
            if most < best[0]:
                break
            if bucket.seq_len not in candidates:
                fits = others <= bucket.seq_len
                candidates[bucket.seq_len] = nearest[fits], others[fits]
            items, fitting = candidates[bucket.seq_len]
            rows = min(bucket.batch_size - 1, len(items))
            # In a padded shape each has a place of its own.
            taken = taking(fitting.tolist(), rows, bucket.flat - first) if bucket.flat else np.arange(rows)
            real = first + int(fitting[taken].sum())
            rate = (real / cost, -bucket.tokens)
            if rate > best:
                best, chosen, company = rate, bucket, items[taken]
        return Plan(chosen, (0, *(1 + company).tolist()))

    def _too_long(self, length: int) -> BucketError:
        return BucketError(f"a sequence of {length} tokens fits no bucket of the ladder {self}")


def filling(bucket: Bucket, lengths: Sequence[int]) -> tuple[list[Plan], list[int]]:
    """Batches of a flat shape that rows of any length fill, and the items that are in none of them.

    Each takes the longest row that is left and then, as long as there is room, the longest that fits: first-fit
    decreasing (https://doi.org/10.1137/0203025).

    Args:
        bucket: the shape.
        lengths: tokens of each item.
    """
    waiting: dict[int, list[int]] = {}
    plans: list[Plan] = []
    left: list[int] = []
    for item, length in enumerate(lengths):
        (waiting.setdefault(length, []) if length <= bucket.seq_len else left).append(item)
    there = sorted(waiting)
    while there:
        items: list[int] = []
        room = bucket.flat
        while there and there[0] <= room and len(items) < bucket.batch_size:
            place = bisect_right(there, room) - 1
            length, same = there[place], waiting[there[place]]
            count = min(len(same), bucket.batch_size - len(items), room // length if length else len(same))
            items += (same.pop() for _ in range(count))
            room -= count * length
            if not same:
                del there[place]
        if room <= SPARE * bucket.flat:
            plans.append(Plan(bucket, tuple(items)))
        else:
            left += items
    return plans, left


def taking(lengths: Iterable[int], rows: int, room: int) -> npt.NDArray[np.int64]:
    """Places of up to so many rows, one after the other, each of which the room that those before leave still takes."""
    taken: list[int] = []
    for place, length in enumerate(lengths):
        if len(taken) == rows:
            break
        if length <= room:
            taken.append(place)
            room -= length
    return np.array(taken, np.int64)
