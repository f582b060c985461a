"""What can compute beside XLA on the devices that a function is traced for; `kernel_choice` finds it out."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from jax.sharding import Mesh

__all__ = ["Kernels", "available", "right_padded"]


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


AVAILABLE: ContextVar[Kernels | None] = ContextVar("AVAILABLE", default=None)


def available() -> Kernels | None:
    """What may be used in what is traced now; None outside of `right_padded`."""
    return AVAILABLE.get()


@contextmanager
def right_padded(kernels: Kernels) -> Iterator[None]:
    """While a function is traced in here, each mask holds the first tokens of its rows, as it does for every Batch.

    Kernels that are told how many keys there are, and not which, may then be used. There is no derivative of them.
    """
    before = AVAILABLE.set(kernels)
    try:
        yield
    finally:
        AVAILABLE.reset(before)
