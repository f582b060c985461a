"""Values by distance, laid out by query and key. The buckets are compared with torch's in the models' tests."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxembed.relative import DistanceBias, distances, log_buckets, skew


@pytest.mark.parametrize("length", [1, 2, 3, 8, 33])
def test_every_query_gets_its_own_row(length: int) -> None:
    """As gathered one by one: the value of query t for key s stands where its distance s - t does."""
    values = np.random.default_rng(length).normal(size=(2, 3, length, 2 * length)).astype(np.float32)
    order = distances(length).tolist()
    want = np.empty((2, 3, length, length), np.float32)
    for t in range(length):
        for s in range(length):
            want[:, :, t, s] = values[:, :, t, order.index(s - t)]
    np.testing.assert_array_equal(np.asarray(skew(jnp.asarray(values))), want)


def test_bias_is_the_table_at_each_bucket() -> None:
    """Also where the table has more rows than there are buckets."""
    bias = DistanceBias(8, 20, 3, rows=11)
    table = np.random.default_rng(0).normal(size=(11, 3)).astype(np.float32)
    bias.buckets.table[...] = jnp.asarray(table)
    apart = np.arange(30)[None, :] - np.arange(30)[:, None]
    want = table[log_buckets(apart, 8, 20)].transpose(2, 0, 1)[None]
    np.testing.assert_array_equal(np.asarray(bias(30)), want)
