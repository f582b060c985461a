"""Sparse vectors over the vocabulary (SPLADE, https://arxiv.org/abs/2109.10086), as scipy holds them.

A model that gives them is run like any other (`runner`); here its dense rows become sparse ones, and are compared and
read. The formulas are sentence-transformers' SparseEncoder 6.2's.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
from tqdm import tqdm

from jaxembed.errors import InputError, UnsupportedModelError
from jaxembed.runner import Runner
from jaxembed.types import Encoding, Output

__all__ = ["compare", "decode", "encode", "is_sparse"]


def encode(
    runner: Runner,
    items: Sequence[Any],
    tokenize: Callable[[Sequence[Any]], Sequence[Encoding]],
    *,
    max_active_dims: int | None = None,
    show_progress_bar: bool = False,
) -> "scipy.sparse.csr_array":
    """Sparse vectors of inputs.

    Args:
        runner: of the model.
        items: n inputs.
        tokenize: makes the Encodings of a window of them.
        max_active_dims: how many entries each keeps, the largest; None for the model's own number, or all.
        show_progress_bar: on standard error.

    Returns:
        float32 [n, V].

    Raises:
        UnsupportedModelError: the model gives no sparse vectors.
        InputError: `max_active_dims` is no number above 0; or what `tokenize` raises.
    """
    # Raises before anything is tokenised.
    runner.engine(Output.SPARSE)
    model = runner.model
    limit = max_active_dims if max_active_dims is not None else model.checkpoint.extra.get("max_active_dims")
    positive("max_active_dims", limit)
    places: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)] * len(items)
    values: list[npt.NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(items)
    with tqdm(total=len(items), desc="encoding", unit="text", disable=not show_progress_bar) as bar:
        for done in runner.run(Output.SPARSE, items, tokenize, dimensions=model.dimension, normalize=False):
            for item, row in zip(done.items, done.rows, strict=True):
                places[item] = active(row, limit)
                values[item] = row[places[item]]
            bar.update(len(done.items))
    ends = np.cumsum([0, *(len(one) for one in places)])
    data = np.concatenate([np.zeros(0, np.float32), *values])
    indices = np.concatenate([np.zeros(0, np.int64), *places])
    return scipy.sparse.csr_array((data, indices, ends), shape=(len(items), model.config.vocab_size))


def active(row: npt.NDArray[np.float32], limit: int | None) -> npt.NDArray[np.int64]:
    """Places of the entries that are not 0, in order; the `limit` largest ones at most, whatever their sign."""
    places = np.flatnonzero(row)
    if limit is None or len(places) <= limit:
        return places
    return np.sort(places[np.argpartition(-np.abs(row[places]), limit - 1)[:limit]])


def is_sparse(vectors: Any) -> bool:
    """Whether these are vectors as scipy holds them."""
    return bool(scipy.sparse.issparse(vectors))


def compare(a: Any, b: Any, measure: str) -> npt.NDArray[np.float32]:
    """How alike sparse vectors are; larger is more alike.

    Args:
        a: [n, V], sparse.
        b: [m, V], sparse.
        measure: "dot" or "cosine".

    Returns:
        float32 [n, m].

    Raises:
        UnsupportedModelError: another measure.
    """
    if measure not in ("cosine", "dot"):
        raise UnsupportedModelError(f"similarity_fn_name is {measure!r}; of sparse vectors supported: cosine, dot")
    x, y = rows_of(a), rows_of(b)
    products = np.asarray((x @ y.T).todense(), np.float32)
    if measure == "dot":
        return products
    norms = [np.maximum(np.sqrt(np.asarray((rows * rows).sum(axis=1), np.float32)), 1e-12) for rows in (x, y)]
    return np.asarray(products / norms[0][:, None] / norms[1][None, :], np.float32)


def decode(rows: Any, token: Callable[[int], str], top_k: int | None) -> list[list[tuple[str, float]]]:
    """The tokens of sparse vectors with their weights, the largest first.

    Args:
        rows: [n, V], or [V] for one.
        token: id -> token.
        top_k: how many of each; None for all.

    Raises:
        InputError: `top_k` is no number above 0.
    """
    positive("top_k", top_k)
    found = []
    matrix = rows_of(rows)
    for start, end in pairwise(matrix.indptr):
        places, weights = matrix.indices[start:end], matrix.data[start:end]
        order = np.argsort(-weights, kind="stable")[:top_k]
        found.append([(token(int(places[i])), float(weights[i])) for i in order])
    return found


def rows_of(vectors: Any) -> "scipy.sparse.csr_array":
    """Vectors as a matrix; a single one as a matrix of one row."""
    if not scipy.sparse.issparse(vectors):
        vectors = np.atleast_2d(np.asarray(vectors, np.float32))
    elif vectors.ndim == 1:
        vectors = vectors.reshape(1, -1)
    return scipy.sparse.csr_array(vectors)


def positive(name: str, value: Any) -> None:
    """Check a number that may be None.

    Raises:
        InputError: it is no whole number above 0.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"{name} is {value!r}; allowed: a whole number from 1 on, or None")
