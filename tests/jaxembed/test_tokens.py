"""Where tokens stand: rows in line, apart and together again."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxembed.tokens import Rows, Tokens
from jaxembed.types import NO_TASK


def stands_of(lengths: list[int]) -> list[slice]:
    """Where each row stands in the line."""
    return list(itertools.starmap(slice, itertools.pairwise(np.cumsum([0, *lengths]))))


def rows_of(lengths: list[int], *, spare: int, longer: int) -> tuple[Rows, list[slice]]:
    """Rows in line, and where each stands."""
    told = jnp.asarray(lengths, jnp.int32)
    rows = Rows.in_line(told, told, tokens=sum(lengths) + spare, length=max(lengths) + longer)
    return rows, stands_of(lengths)


@partial(jax.jit, static_argnames=("tokens", "length"))
def laid_out(lengths: Any, line: Any, *, tokens: int, length: int) -> tuple[Any, ...]:
    """A line by rows and back, and what rows say of themselves: compiled once for an example's shapes."""
    rows = Rows.in_line(lengths, lengths, tokens=tokens, length=length)
    apart = rows.apart(line)
    each = rows.each(jnp.arange(lengths.shape[0]))
    return apart, rows.together(apart), each, rows.places[0], rows.mask


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(any), st.integers(0, 3), st.integers(0, 2))
def test_apart_and_together(lengths: list[int], spare: int, longer: int) -> None:
    """Each row by itself, its places from 0 on, and back to where it was."""
    total, longest = sum(lengths), max(lengths) + longer
    line = np.arange(1, total + spare + 1, dtype=np.int32)[None]
    told = jnp.asarray(lengths, jnp.int32)
    found = laid_out(told, jnp.asarray(line), tokens=total + spare, length=longest)
    apart, together, each, places, mask = map(np.asarray, found)
    assert apart.shape == mask.shape == (len(lengths), longest)
    for row, (length, own) in enumerate(zip(lengths, stands_of(lengths), strict=True)):
        np.testing.assert_array_equal(apart[row, :length], line[0, own])
        np.testing.assert_array_equal(places[own], np.arange(length))
        np.testing.assert_array_equal(mask[row], np.arange(longest) < length)
    np.testing.assert_array_equal(together[0, :total], line[0, :total])
    assert places.max(initial=0) < longest
    np.testing.assert_array_equal(each[0, :total], np.repeat(np.arange(len(lengths)), lengths))


def test_vectors_go_the_same_way() -> None:
    """Whatever stands behind the token's axis."""
    rows, stands = rows_of([2, 3], spare=1, longer=1)
    x = np.random.default_rng(0).normal(size=(1, 6, 2, 3)).astype(np.float32)
    apart = np.asarray(rows.apart(jnp.asarray(x)))
    assert apart.shape == (2, 4, 2, 3)
    np.testing.assert_array_equal(apart[1, :3], x[0, stands[1]])
    np.testing.assert_array_equal(rows.together(jnp.asarray(apart))[0, :5], x[0, :5])


def test_nothing_looks_behind_the_last_token() -> None:
    """What stands there may be no number at all."""
    rows, _ = rows_of([2, 0, 3], spare=2, longer=2)
    x = np.ones((1, 7, 4), np.float32)
    x[0, 5:] = np.nan
    line = jnp.asarray(x)
    assert np.isfinite(rows.apart(line)).all()
    assert np.isfinite(rows.one(line, jnp.asarray([1, 0, 4]))).all()
    np.testing.assert_array_equal(rows.total(line, rows.mask.astype(jnp.float32))[:, 0], [2, 0, 3])
    none = Rows.in_line(jnp.zeros(2, jnp.int32), jnp.zeros(2, jnp.int32), tokens=4, length=3)
    np.testing.assert_array_equal(none.total(jnp.full((1, 4, 1), jnp.nan), jnp.ones((2, 3))), [[0], [0]])


def test_a_row_may_have_tokens_that_attention_does_not_see() -> None:
    """They stand in the line all the same."""
    rows = Rows.in_line(jnp.asarray([4, 2]), jnp.asarray([3, 2]), tokens=6, length=4)
    np.testing.assert_array_equal(rows.mask, [[1, 1, 1, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(rows.places, [[0, 1, 2, 3, 0, 1]])


def test_padded_rows_stay_as_they_are() -> None:
    """Each has a line of its own."""
    tokens = Tokens.plain(jnp.asarray([[1, 2], [3, 0]]), jnp.asarray([[True, True], [True, False]]))
    rows = tokens.rows
    assert rows.apart(tokens.input_ids) is rows.together(tokens.input_ids) is tokens.input_ids
    assert tokens.padded.input_ids is tokens.input_ids
    np.testing.assert_array_equal(rows.places, [[0, 1]])
    np.testing.assert_array_equal(rows.each(jnp.asarray([7, 8])), [[7], [8]])
    np.testing.assert_array_equal(tokens.tasks, [NO_TASK, NO_TASK])


@pytest.mark.parametrize("what", ["gradient", "jit"])
def test_transformations(what: str) -> None:
    """A gradient goes to each token once; the rows go in and out of a compiled function."""
    rows, _ = rows_of([2, 3], spare=1, longer=0)

    def total(x: jax.Array, rows: Rows) -> Any:
        apart = rows.apart(x)
        return jnp.sum(jnp.where(rows.mask, apart, 0.0))

    x = jnp.asarray([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    if what == "jit":
        assert jax.jit(total)(x, rows) == 15.0
    else:
        np.testing.assert_array_equal(jax.grad(total)(x, rows), [[1, 1, 1, 1, 1, 0]])
