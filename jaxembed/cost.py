"""What a batch of a shape costs: in tokens of computation, or in seconds, fitted to measured times. Knows no JAX."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxembed.types import Bucket

__all__ = ["ACCELERATOR_PRICES", "COUNTED_PRICES", "LEAST_CALL", "PRICES", "Cost", "fit_cost"]


class Cost(NamedTuple):
    """What a batch costs: call + token * tokens + place * places + pair * places * length + real * real tokens.

    Attributes:
        token: there is room for.
        real: that stands in a flat shape, where what stands there is counted; a padded one computes all of its tokens.
            0 where all shapes do, and `token` is all that one costs.
    """

    call: float
    token: float
    place: float
    pair: float
    real: float = 0.0

    def of(self, bucket: Bucket) -> float:
        """Of one batch of this shape, whatever stands in it."""
        token = self.token if bucket.flat else self.token + self.real
        return self.call + bucket.tokens * token + bucket.batch_size * self.of_places(bucket.seq_len)

    def spent(self, bucket: Bucket, tokens: int) -> float:
        """Of one batch of this shape with so many tokens in it."""
        return self.of(bucket) + self.real * tokens

    @property
    def in_tokens(self) -> "Cost":
        """The same in parts of what a token costs in a padded batch, where it is a place too; must cost something."""
        unit = self.token + self.real + self.place
        return Cost(*(factor / unit for factor in self))

    def of_row(self, length: int) -> float:
        """What a row of this length adds to a padded batch."""
        return length * (self.token + self.real) + self.of_places(length)

    def of_places(self, length: int) -> float:
        """What a row of at most this length adds to a flat batch of rows of this length, beside its tokens."""
        return length * (self.place + self.pair * length)


PRICES = Cost(call=16.0, token=1.0, place=0.1, pair=0.1 / 128)
"""What a batch costs on CPU, in tokens of computation, before that was measured: a dispatch 16 of them, a place in
attention's rows a tenth of one, and as much again for each 128 tokens of its row."""

COUNTED_PRICES = Cost(call=8.0, token=0.02, place=0.1, pair=0.1 / 128, real=1.0)
"""The same on CPU where flat shapes compute the tokens that there are (docs/performance.md)."""

LEAST_CALL = 4.0
"""A call costs at least so many tokens where they are counted: 6 to 11 were measured on a quiet machine, but what is
timed beside other work may say none at all, and then one row a batch would seem to be as good as many."""

ACCELERATOR_PRICES = Cost(call=4096.0, token=1.0, place=0.0, pair=0.0)
"""The same for each device of another kind; measured on a GPU, a guess for TPU (docs/performance.md)."""


def fit_cost(measured: Mapping[Bucket, float]) -> Cost:
    """The cost in seconds that explains measured times best: least squares with no factor under 0.

    The residuals count relative to the time, so that the small shapes are not lost beside the large ones. Of four
    factors every choice of those that are not 0 is tried: SciPy's `nnls` would add some 30 MB to what a server holds.

    Args:
        measured: shape -> seconds of a batch.
    """
    seconds = np.array(list(measured.values()))
    terms = np.array([(1, b.tokens, b.places, b.places * b.seq_len) for b in measured], np.float64)
    # Of like size, the factors can be found: seconds a call beside seconds a token and a pair of tokens.
    scale = terms.max(axis=0)
    terms = terms / scale / seconds[:, None]
    every = range(terms.shape[1])
    best, least = np.zeros(len(every)), float(len(seconds))
    for some in itertools.chain.from_iterable(itertools.combinations(every, count + 1) for count in every):
        factors = np.zeros(len(every))
        factors[list(some)] = np.linalg.lstsq(terms[:, some], np.ones(len(seconds)))[0]
        missed = float(np.sum((terms @ factors - 1) ** 2))
        if factors.min() >= 0 and missed < least:
            best, least = factors, missed
    return Cost(*(float(factor) for factor in best / scale))
