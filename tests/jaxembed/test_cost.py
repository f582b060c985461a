"""The fit of costs to times: what they were made of, and SciPy's non-negative least squares."""

import numpy as np
import pytest
from scipy.optimize import nnls

from jaxembed import Bucket
from jaxembed.cost import Cost, fit_cost

COST = Cost(call=0.003, token=4e-5, place=1e-5, pair=5e-8)


def test_the_fit_finds_what_the_times_were_made_of() -> None:
    """Exactly without noise; no factor is ever negative. Of padded shapes alone, tokens and places are one."""
    padded = [Bucket(b, t) for b in (1, 4, 16) for t in (16, 64, 256)]
    found = fit_cost({bucket: COST.of(bucket) for bucket in padded})
    np.testing.assert_allclose([found.of(bucket) for bucket in padded], [COST.of(bucket) for bucket in padded])
    buckets = [*padded, Bucket(8, 16, 64), Bucket(4, 64, 128), Bucket(12, 64, 512)]
    found = fit_cost({bucket: COST.of(bucket) for bucket in buckets})
    np.testing.assert_allclose(found, COST, rtol=1e-6)
    noisy = fit_cost({bucket: 1.0 / bucket.tokens for bucket in buckets})
    assert min(noisy) >= 0


@pytest.mark.parametrize("seed", range(8))
def test_no_other_factors_fit_better(seed: int) -> None:
    """Where some of them would be under 0, the others are SciPy's."""
    random = np.random.default_rng(seed)
    buckets = [Bucket(b, t, flat) for b in (2, 8) for t in (16, 64, 256) for flat in (0, b * t // 2)]
    seconds = random.uniform(1e-3, 1e-2, len(buckets))
    sizes = np.array([(1, b.tokens, b.places, b.places * b.seq_len) for b in buckets], np.float64)
    want, _ = nnls(sizes / sizes.max(axis=0) / seconds[:, None], np.ones(len(seconds)))
    found = fit_cost(dict(zip(buckets, seconds, strict=True)))
    np.testing.assert_allclose(np.array(found[:4]) * sizes.max(axis=0), want, rtol=1e-6, atol=1e-12)


def test_in_tokens() -> None:
    """A token of a padded batch costs 1, its place included; shapes compare as they did."""
    prices = COST.in_tokens
    assert prices.token + prices.place == pytest.approx(1.0)
    one, other = Bucket(4, 16), Bucket(8, 64, 200)
    assert prices.of(one) / prices.of(other) == pytest.approx(COST.of(one) / COST.of(other))


COUNTED = Cost(call=0.002, token=2e-6, place=0.0, pair=0.0, real=2e-4)
"""Flat shapes compute the tokens that there are."""


def test_tokens_that_are_there_are_paid_for_apart() -> None:
    """By what stands in a flat shape; by all that a padded one has room for."""
    flat, padded = Bucket(8, 64, 256), Bucket(4, 64)
    assert COUNTED.of(flat) == pytest.approx(0.002 + 256 * 2e-6)
    assert COUNTED.spent(flat, 100) == pytest.approx(COUNTED.of(flat) + 100 * 2e-4)
    assert COUNTED.of(padded) == pytest.approx(0.002 + 256 * (2e-6 + 2e-4))
    assert COST.spent(flat, 100) == COST.of(flat)
    assert COUNTED.in_tokens.real == pytest.approx(2e-4 / (2e-6 + 2e-4))
    assert COUNTED.of_row(10) == pytest.approx(10 * (2e-6 + 2e-4))
