"""How alike vectors are, by the measures that sentence-transformers names. numpy only."""

import numpy as np
import numpy.typing as npt

from jaxembed.errors import UnsupportedModelError

__all__ = ["compare"]


def compare(a: npt.ArrayLike, b: npt.ArrayLike, measure: str) -> npt.NDArray[np.float32]:
    """Each of some vectors with each of others; larger is more alike.

    Args:
        a: [n, d] or [d].
        b: [m, d] or [d].
        measure: "cosine", "dot", "euclidean" or "manhattan", the last two negative.

    Returns:
        float32 [n, m].

    Raises:
        UnsupportedModelError: another measure.
    """
    x, y = (np.atleast_2d(np.asarray(vectors, np.float32)) for vectors in (a, b))
    match measure:
        case "cosine":
            return np.asarray(unit_rows(x) @ unit_rows(y).T)
        case "dot":
            return np.asarray(x @ y.T)
        case "euclidean":
            return np.stack([-np.linalg.norm(row - y, axis=1) for row in x])
        case "manhattan":
            return np.stack([-np.abs(row - y).sum(axis=1) for row in x])
    raise UnsupportedModelError(
        f"similarity_fn_name is {measure!r}; supported: cosine, dot, euclidean, manhattan; of vectors of tokens "
        "max_similarity"
    )


def unit_rows(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows divided by their L2 norms, which count as at least 1e-12."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12), np.float32)
