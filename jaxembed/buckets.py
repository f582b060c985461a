"""The ladder of compiled shapes: smallest fit, and planning a queue into batches. Knows no text and no device."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxembed.errors import BucketError
from jaxembed.types import NO_TASK, Batch, Bucket, Column, Encoding

__all__ = ["DISPATCH_TOKENS", "Ladder", "Plan", "Row", "empty", "pack"]

DISPATCH_TOKENS = 16
"""What one more dispatch costs on CPU, in tokens of computation: the planner's price for splitting a group of rows."""

SHORTEST = 16

PADDING = np.array([0, 0, 1, 0, 0, NO_TASK], np.int32)
"""What a row of padding says, in the order of `Column`: its vector is of one feature."""


class Plan(NamedTuple):
    """One batch to be: a shape, and which items of the queue go into it, longest first."""

    bucket: Bucket
    items: tuple[int, ...]


class Row(NamedTuple):
    """One item on its way into a Batch; the fields are those of `types.Batch`."""

    encoding: Encoding
    dimensions: int
    normalize: bool
    owner: int


class Ladder:
    """The set of (batch_size, seq_len) shapes that are compiled ahead.

    Args:
        buckets: the shapes, in any order; at least one.

    Attributes:
        max_length: the longest sequence that fits, in tokens.
        batch_tokens: tokens of the largest shape of several rows, padding included; of the largest of all where none
            has several. A single row may be longer.
        max_rows: rows of the tallest shape.
        dispatch_tokens: what one more dispatch costs, in tokens of computation; an engine that plans by the ladder puts
            its own price there.

    Raises:
        BucketError: no buckets, or one with a size under 1.
    """

    def __init__(self, buckets: Iterable[Bucket]) -> None:
        self.buckets = tuple(sorted(set(buckets), key=lambda b: (b.tokens, b.seq_len)))
        if not self.buckets:
            raise BucketError("a ladder needs at least one bucket")
        if any(b.batch_size < 1 or b.seq_len < 1 for b in self.buckets):
            raise BucketError(f"a bucket needs a batch size and a length of at least 1: {self}")
        self.max_length = max(b.seq_len for b in self.buckets)
        several = [b.tokens for b in self.buckets if b.batch_size > 1]
        self.batch_tokens = max(several or [b.tokens for b in self.buckets])
        self.max_rows = max(b.batch_size for b in self.buckets)
        self.dispatch_tokens = DISPATCH_TOKENS
        self._by_length: dict[int, tuple[Bucket, ...]] = {}
        self._of_length: dict[int, list[Bucket]] = {}
        for bucket in sorted(self.buckets, key=lambda b: (b.seq_len, b.batch_size)):
            self._of_length.setdefault(bucket.seq_len, []).append(bucket)

    @classmethod
    def default(cls, *, max_length: int, max_batch_tokens: int, batch_multiple: int = 1) -> "Ladder":
        """Powers of two up to the model's length; per length the batch sizes 1, 4, 16, ... and the fullest.

        Args:
            max_length: the longest sequence, in tokens; always a rung of its own.
            max_batch_tokens: tokens a dispatch should hold, padding included. A single row of `max_length`
                is always allowed, even when it alone is more.
            batch_multiple: every batch size is a multiple of this (the number of devices on the data axis).

        Raises:
            BucketError: an argument under 1.
        """
        if min(max_length, max_batch_tokens, batch_multiple) < 1:
            raise BucketError(
                f"max_length={max_length}, max_batch_tokens={max_batch_tokens}, batch_multiple={batch_multiple}: "
                "each must be at least 1"
            )
        lengths = [max_length]
        rung = SHORTEST
        while rung < max_length:
            lengths.append(rung)
            rung *= 2
        return cls.of_lengths(lengths, max_batch_tokens=max_batch_tokens, batch_multiple=batch_multiple)

    @classmethod
    def of_lengths(cls, lengths: Iterable[int], *, max_batch_tokens: int, batch_multiple: int = 1) -> "Ladder":
        """Of each length the batch sizes 1, 4, 16, ... and the fullest; the arguments are those of `default`."""
        buckets = set()
        for length in lengths:
            most = max(1, max_batch_tokens // (length * batch_multiple))
            size = 1
            while size < most:
                buckets.add(Bucket(size * batch_multiple, length))
                size *= 4
            buckets.add(Bucket(most * batch_multiple, length))
        return cls(buckets)

    def smallest(self) -> "Ladder":
        """Of each length the shape with the fewest rows: they take whatever this ladder takes, and are ready first."""
        found: dict[int, Bucket] = {}
        for bucket in self.buckets:
            # They stand in the order of their tokens.
            found.setdefault(bucket.seq_len, bucket)
        return Ladder(found.values())

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
        """For each batch size the shortest bucket that takes `length` tokens, by batch size, smallest first.

        Raises:
            BucketError: no bucket is that long.
        """
        found = self._by_length.get(length)
        if found is None:
            best: dict[int, Bucket] = {}
            for bucket in self.buckets:
                if bucket.seq_len >= length:
                    held = best.get(bucket.batch_size)
                    if held is None or bucket.seq_len < held.seq_len:
                        best[bucket.batch_size] = bucket
            if not best:
                raise self._too_long(length)
            found = tuple(best[size] for size in sorted(best))
            self._by_length[length] = found
        return found

    def plan(self, lengths: Sequence[int]) -> list[Plan]:
        """Put every item into exactly one batch at the least cost.

        Rows are sorted by length, longest first, and cut into runs; the cheapest cutting is found exactly by
        dynamic programming over the cost `bucket.tokens + dispatch_tokens` per batch.

        Args:
            lengths: tokens of each item.

        Returns:
            Plans whose items partition `range(len(lengths))`; each item fits its bucket.

        Raises:
            BucketError: an item is longer than the ladder.
        """
        n = len(lengths)
        if n == 0:
            return []
        order = sorted(range(n), key=lengths.__getitem__, reverse=True)
        # best[i]: least cost of placing the i-th row and all shorter ones; from the shortest upwards. Behind the last
        # row nothing costs anything, however far a bucket reaches.
        best = [0] * (n + self.max_rows)
        choice: list[Bucket] = [self.buckets[0]] * n
        length, options = -1, []
        for i in range(n - 1, -1, -1):
            if lengths[order[i]] != length:
                length = lengths[order[i]]
                options = [
                    (bucket.batch_size, bucket.tokens + self.dispatch_tokens, bucket) for bucket in self.fitting(length)
                ]
            (size, cost, choice[i]), *others = options
            least = cost + best[i + size]
            for size, cost, bucket in others:
                if cost + best[i + size] < least:
                    least, choice[i] = cost + best[i + size], bucket
            best[i] = least
        plans = []
        i = 0
        while i < n:
            bucket = choice[i]
            plans.append(Plan(bucket, tuple(order[i : i + bucket.batch_size])))
            i += bucket.batch_size
        return plans

    def first_batch(self, lengths: Sequence[int]) -> Plan:
        """The batch to run next: it holds item 0 and does the most real tokens for its cost.

        For a queue whose other items may still find better company: nothing is said about the rest.

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
        best = (-1.0, 0)
        chosen, company = self.buckets[0], nearest
        all_fit = False
        # Batch sizes of shapes that take all rows: a longer one of the same size would only pad more.
        taken: set[int] = set()
        for seq_len, buckets in self._of_length.items():
            if seq_len < first:
                continue
            if not all_fit:
                fits = others <= seq_len
                all_fit = bool(fits.all())
                candidates, tokens = nearest[fits], np.cumsum(others[fits])
            for bucket in buckets:
                if bucket.batch_size in taken:
                    continue
                if all_fit:
                    taken.add(bucket.batch_size)
                count = min(bucket.batch_size - 1, len(candidates))
                real = first + int(tokens[count - 1]) if count else first
                rate = (real / (bucket.tokens + self.dispatch_tokens), -bucket.tokens)
                if rate > best:
                    best, chosen, company = rate, bucket, candidates[:count]
        return Plan(chosen, (0, *(1 + company).tolist()))

    def _too_long(self, length: int) -> BucketError:
        return BucketError(f"a sequence of {length} tokens fits no bucket of the ladder {self}")


def pack(bucket: Bucket, rows: Sequence[Row]) -> Batch:
    """Pad rows into the arrays of one Batch.

    Raises:
        BucketError: more rows, or a longer row, than the bucket holds.
    """
    if len(rows) > bucket.batch_size or any(len(row.encoding) > bucket.seq_len for row in rows):
        longest = max(len(row.encoding) for row in rows)
        raise BucketError(f"{len(rows)} rows of up to {longest} tokens do not fit the bucket {bucket}")
    batch = empty(bucket, [row.owner for row in rows])
    input_ids = batch.input_ids
    told = []
    for i, (encoding, dimensions, normalize, _) in enumerate(rows):
        length = len(encoding.ids)
        input_ids[i, :length] = encoding.ids
        seen = length if encoding.attended is None else encoding.attended
        # In the order of Column, and written all at once: a number at a time takes three times as long.
        told.append((seen, encoding.prompt_length, dimensions, normalize, encoding.second_start, encoding.task))
    if told:
        batch.table[: len(told), : len(Column)] = told
    return batch


def empty(bucket: Bucket, owners: Sequence[int] = ()) -> Batch:
    """A batch of nothing but padding, as far as is known yet."""
    table: npt.NDArray[np.int32] = np.zeros((bucket.batch_size, len(Column) + bucket.seq_len), np.int32)
    table[:, : len(Column)] = PADDING
    return Batch(bucket, table, np.array(owners, np.int64))
