"""What can compute beside XLA on the devices that a function is traced for; `kernel_choice` finds it out."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from jax.sharding import Mesh
from jaxtyping import Array, Int, Shaped

__all__ = ["Kernels", "Line", "available", "cpu_takes", "right_padded", "tokens_there"]


class Kernels(NamedTuple):
    """What there is on the devices of a mesh.

    Attributes:
        mesh: the devices.
        fused: features of the widest head that cuDNN's fused attention takes there; 0 if it takes none.
        rows: whether `row_attention` works there.
        cpu_tokens: up to so many tokens `cpu_kernels` are faster for products with weights; 0 where those kernels are
            not to be had.
    """

    mesh: Mesh
    fused: int = 0
    rows: bool = False
    cpu_tokens: int = 0


class Line(NamedTuple):
    """Rows that stand one right behind another.

    Attributes:
        room: tokens that there is room for.
        tokens: how many there are, the first ones. What stands behind them is of no use, and need not be computed.
    """

    room: int
    tokens: Int[Array, ""]


AVAILABLE: ContextVar[Kernels | None] = ContextVar("AVAILABLE", default=None)
LINE: ContextVar[Line | None] = ContextVar("LINE", default=None)


def available() -> Kernels | None:
    """What may be used in what is traced now; None outside of `right_padded`."""
    return AVAILABLE.get()


def cpu_takes(x: Shaped[Array, "L M *rest"]) -> bool:
    """Whether so many tokens are left to `cpu_kernels`."""
    kernels = AVAILABLE.get()
    return kernels is not None and x.shape[0] * x.shape[1] <= kernels.cpu_tokens


def tokens_there(x: Shaped[Array, "L M *rest"]) -> Int[Array, ""] | None:
    """How many tokens of what stands in lines there are; None where it may be all of them."""
    line = LINE.get()
    return None if line is None or x.shape[:2] != (1, line.room) else line.tokens


@contextmanager
def right_padded(kernels: Kernels, line: Line | None = None) -> Iterator[None]:
    """While a function is traced in here, each mask holds the first tokens of its rows, as it does for every Batch.

    Kernels that are told how many keys there are, and not which, may then be used. There is no derivative of them.

    Args:
        kernels: what there is.
        line: the line that all rows stand in, if they do.
    """
    before, line_before = AVAILABLE.set(kernels), LINE.set(line)
    try:
        yield
    finally:
        AVAILABLE.reset(before)
        LINE.reset(line_before)
