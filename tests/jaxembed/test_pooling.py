"""Pooling against sentence-transformers' own module, and what follows it: slice, then norm."""

from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer import modules

from jaxembed.pooling import finish, pool
from jaxembed.tokens import Rows
from jaxembed.types import Pooling, PoolingMode

WIDTH = 8
LENGTH = 9
LENGTHS = [9, 1, 5, 2, 8]
SINGLE = [(mode,) for mode in PoolingMode]
PAIRS = list(combinations(reversed(PoolingMode), 2))
MODES = [*SINGLE, *PAIRS, tuple(PoolingMode)]


def tokens(seed: int = 0) -> np.ndarray:
    """Token vectors, float32 [B, T, D]; all negative in one feature, so that a maximum over padding's 0 shows."""
    x = np.random.default_rng(seed).normal(size=(len(LENGTHS), LENGTH, WIDTH)).astype(np.float32)
    x[:, :, 0] = -np.abs(x[:, :, 0]) - 1
    return x


def masks(side: str) -> np.ndarray:
    """bool [B, T] with the padding on the left or on the right."""
    positions = np.arange(LENGTH)[None, :]
    lengths = np.array(LENGTHS)[:, None]
    return positions < lengths if side == "right" else positions >= LENGTH - lengths


def reference(x: np.ndarray, mask: np.ndarray, modes: Any, prompt_length: int | None = None) -> np.ndarray:
    """What sentence-transformers makes of it."""
    module = modules.Pooling(WIDTH, [mode.value for mode in modes], include_prompt=prompt_length is None)
    features = {"token_embeddings": torch.from_numpy(x), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
    if prompt_length is not None:
        features["prompt_length"] = prompt_length
    return module(features)["sentence_embedding"].numpy()


def pooled(x: np.ndarray, mask: np.ndarray, pooling: Pooling, prompt_lengths: Any = 0) -> np.ndarray:
    """Ours, jitted."""
    prompts = np.broadcast_to(np.asarray(prompt_lengths, np.int32), len(x))
    return np.asarray(jax.jit(pool, static_argnums=3)(x, Rows(mask), prompts, pooling))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("modes", MODES, ids="+".join)
def test_every_mode_and_concatenation(modes: tuple[PoolingMode, ...], side: str) -> None:
    """Alone, every pair against the legacy order, and all six, with padding on either side."""
    x, mask = tokens(), masks(side)
    got = pooled(x, mask, Pooling(modes))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, reference(x, mask, modes), atol=1e-6)


@pytest.mark.parametrize("modes", [*SINGLE, tuple(PoolingMode)], ids="+".join)
@pytest.mark.parametrize("prompt_length", [None, 0, 1, 4])
def test_rows_in_line(modes: tuple[PoolingMode, ...], prompt_length: int | None) -> None:
    """One behind another, an empty one and tokens of padding behind them."""
    x, mask = tokens(), masks("right")
    line = np.concatenate([x[mask], np.full((4, WIDTH), 1e6, np.float32)])[None]
    lengths = jnp.asarray([*LENGTHS, 0], jnp.int32)
    prompts = jnp.full(len(lengths), prompt_length or 0, jnp.int32)
    pooling = Pooling(modes, include_prompt=prompt_length is None)

    def run(line: jax.Array) -> jax.Array:
        rows = Rows.in_line(lengths, lengths, tokens=line.shape[1], length=LENGTH)
        return pool(line, rows, prompts, pooling)

    got = np.asarray(jax.jit(run)(line))
    longer = np.array(LENGTHS) > (prompt_length or 0)
    np.testing.assert_allclose(got[:-1][longer], reference(x, mask, modes, prompt_length)[longer], atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("prompt_length", [0, 1, 4])
@pytest.mark.parametrize("modes", [*SINGLE, tuple(PoolingMode)], ids="+".join)
def test_leaving_the_prompt_out(modes: tuple[PoolingMode, ...], prompt_length: int, side: str) -> None:
    """Rows that are longer than the prompt: the rest of their tokens, at their own positions."""
    x, mask = tokens(), masks(side)
    longer = np.array(LENGTHS) > prompt_length
    got = pooled(x, mask, Pooling(modes, include_prompt=False), prompt_length)
    np.testing.assert_allclose(got[longer], reference(x, mask, modes, prompt_length)[longer], atol=1e-6)


@pytest.mark.parametrize("mode", [mode for mode in PoolingMode if mode is not PoolingMode.MAX])
def test_a_prompt_that_fills_its_row(mode: PoolingMode) -> None:
    """Nothing is left to pool: as sentence-transformers has it, and never NaN."""
    x, mask = tokens(), masks("right")
    got = pooled(x, mask, Pooling((mode,), include_prompt=False), LENGTH)
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got, reference(x, mask, (mode,), LENGTH), atol=1e-6)


def test_prompts_of_different_lengths_in_one_batch() -> None:
    """Each row leaves out its own."""
    x, mask = tokens(), masks("right")
    lengths = [3, 0, 4, 1, 2]
    got = pooled(x, mask, Pooling((PoolingMode.MEAN, PoolingMode.CLS), include_prompt=False), lengths)
    for row, prompt_length in enumerate(lengths):
        one = slice(row, row + 1)
        expected = reference(x[one], mask[one], (PoolingMode.MEAN, PoolingMode.CLS), prompt_length)
        np.testing.assert_allclose(got[one], expected, atol=1e-6)


@pytest.mark.parametrize("mode", PoolingMode)
def test_prompt_lengths_are_ignored_unless_the_model_asks(mode: PoolingMode) -> None:
    """`include_prompt` is the model's setting, not the request's."""
    x, mask = tokens(), masks("right")
    np.testing.assert_array_equal(pooled(x, mask, Pooling((mode,)), 3), pooled(x, mask, Pooling((mode,)), 0))


@pytest.mark.parametrize("mode", PoolingMode)
def test_padding_does_not_leak(mode: PoolingMode) -> None:
    """Whatever stands in it."""
    x, mask = tokens(), masks("right")
    other = np.where(mask[:, :, None], x, 1e6).astype(np.float32)
    np.testing.assert_array_equal(pooled(x, mask, Pooling((mode,))), pooled(other, mask, Pooling((mode,))))


def finished(vectors: np.ndarray, dimensions: Any, normalize: Any) -> np.ndarray:
    """`finish`, jitted; one number stands for every row."""
    sizes = np.broadcast_to(np.asarray(dimensions, np.int32), len(vectors))
    flags = np.broadcast_to(np.asarray(normalize, np.bool_), len(vectors))
    return np.asarray(jax.jit(finish)(vectors, sizes, flags))


def test_slice_before_norm() -> None:
    """A cut vector is a unit vector: [3, 4, 12] cut to 2 is [0.6, 0.8, 0], not a part of [3, 4, 12] / 13."""
    vectors = np.array([[3.0, 4.0, 12.0]] * 4, np.float32)
    got = finished(vectors, [2, 2, 3, 1], [True, False, True, True])
    expected = [[0.6, 0.8, 0], [3, 4, 0], [3 / 13, 4 / 13, 12 / 13], [1, 0, 0]]
    np.testing.assert_allclose(got, expected, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_norm_is_torch_s(scale: float) -> None:
    """Sentence-transformers' Normalize, for small and large vectors."""
    vectors = tokens().mean(axis=1) * np.float32(scale)
    expected = modules.Normalize()({"sentence_embedding": torch.from_numpy(vectors)})["sentence_embedding"].numpy()
    np.testing.assert_allclose(finished(vectors, WIDTH, True), expected, atol=1e-6)


def test_a_zero_vector_stays_zero() -> None:
    """The norm counts as at least 1e-12."""
    got = finished(np.zeros((2, 4), np.float32), 4, [True, False])
    np.testing.assert_array_equal(got, np.zeros((2, 4), np.float32))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_gradient_at_zero_is_finite(normalize: bool) -> None:
    """One empty row must not turn a training step into NaN."""

    def total(vectors: jax.Array) -> jax.Array:
        rows = vectors.shape[0]
        return finish(vectors, jnp.full((rows,), 3, jnp.int32), jnp.full((rows,), normalize)).sum()

    gradient = jax.grad(total)(jnp.asarray([[0.0, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]]))
    assert np.isfinite(gradient).all()
    # Behind the cut nothing counts.
    np.testing.assert_array_equal(gradient[:, 3], [0.0, 0.0])


@pytest.mark.parametrize("mode", PoolingMode)
def test_the_gradient_of_pooling_is_finite_on_padding(mode: PoolingMode) -> None:
    """A row of nothing but padding beside a real one."""
    x = jnp.asarray(tokens()[:2])
    mask = jnp.asarray([[True] * 4 + [False] * 5, [False] * 9])

    def total(x: jax.Array) -> jax.Array:
        vectors = pool(x, Rows(mask), jnp.zeros((2,), jnp.int32), Pooling((mode,)))
        return vectors[:1].sum()

    gradient = np.asarray(jax.grad(total)(x))
    assert np.isfinite(gradient).all()
    assert gradient[0, :4].any()
    assert not gradient[0, 4:].any()
    assert not gradient[1].any()
