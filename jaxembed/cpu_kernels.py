"""Products with weights and attention in C++, for one CPU and float32, called by XLA's executables.

XLA's matrix product on CPU repacks one of its operands at every call, which few tokens do not repay, and its attention
over short rows is many small steps. The source, `cpu_kernels.cpp`, is compiled on the machine it runs on, by that
machine's C++ compiler, which knows the vectors that there are; without one everything is XLA's (docs/performance.md).
Letters in shapes are those of `layers` and `tokens`.
"""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

__all__ = ["Product", "attention", "build", "compiler", "host_cpu", "lanes", "load", "products", "running"]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-shared", "-pthread"),
)
TARGETS = ("jaxembed_linear", "jaxembed_attention")
NEEDED = ("avx2", "fma")
"""What a CPU must be able to do, as Linux calls it: on others nothing was measured."""

ACTIVATIONS: Mapping[str | None, int] = {None: 0, "gelu": 1}
"""Functions that a product can end with, by Hugging Face's names, and their numbers in the source."""

Product = tuple[Float[Array, "N K"], Float[Array, " N"] | None]
"""A kernel and its bias."""


def compiler() -> Path | None:
    """The C++ compiler for this machine: $CXX, or `c++`; None if there is none, or nothing for it to do."""
    if platform.machine() != "x86_64" or not all(f" {flag} " in f"{host_cpu()} " for flag in NEEDED):
        return None
    found = shutil.which(os.environ.get("CXX") or "c++")
    return None if found is None else Path(found).resolve()


def build(program: Path) -> bytes | None:
    """Compile the source into a shared library; None if that compiler cannot."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "kernels.so"
        command = [*map(str, (program, *FLAGS, SOURCE, "-o", target)), f"-I{jax.ffi.include_dir()}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            logger.warning("%s cannot be run: %s", program, error.strerror)
            return None
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or ["it says nothing"]
            logger.warning("%s cannot compile the kernels for CPU, XLA's are used: %s", program, lines[0])
            return None
        return target.read_bytes()


_loaded: ctypes.PyDLL | None = None


def load(library: bytes) -> None:
    """Make the functions of a compiled library known to XLA. Once in a process; its code stays.

    Raises:
        OSError: this is no library of this machine.
    """
    global _loaded
    if _loaded is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.so"
        file.write_bytes(library)
        # Its functions are called with the interpreter's lock held: they return at once.
        loaded = ctypes.PyDLL(str(file))
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    loaded.jaxembed_lanes.restype = ctypes.c_int64
    _loaded = loaded


def lanes() -> int:
    """Numbers of a vector: heads must have a multiple of twice as many features.

    Raises:
        RuntimeError: nothing is loaded.
    """
    if _loaded is None:
        raise RuntimeError("the kernels for CPU are not loaded")
    return int(_loaded.jaxembed_lanes())


@contextmanager
def running() -> Iterator[None]:
    """A run of a model: those that are under way at a time share the cores out among them."""
    if _loaded is None:
        yield
        return
    _loaded.jaxembed_begin()
    try:
        yield
    finally:
        _loaded.jaxembed_end()


def products(
    x: Float[Array, "L M K"], matrices: Sequence[Product], activation: str | None = None
) -> tuple[Float[Array, "L M _"], ...]:
    """activation(x @ kernel^T + bias) of each matrix, float32.

    Args:
        x: float32.
        matrices: kernels, [output, input], and their biases.
        activation: one of `ACTIVATIONS`.
    """
    depth = x.shape[-1]
    tokens = x.size // depth
    room = -(-tokens // lanes()) * lanes() * depth
    shapes = [(*x.shape[:-1], kernel.shape[0]) for kernel, _ in matrices]
    operands = [y for kernel, bias in matrices for y in (kernel, jnp.zeros(0, jnp.float32) if bias is None else bias)]
    call = jax.ffi.ffi_call(TARGETS[0], [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*shapes, (room,))])
    results: Sequence[jax.Array] = call(x, *operands, activation=np.int32(ACTIVATIONS[activation]))
    return tuple(results[:-1])


def attention(
    query: Float[Array, "L M ND"],
    key: Float[Array, "L M KD"],
    value: Float[Array, "L M KD"],
    starts: Int[Array, " B"],
    counts: Int[Array, " B"],
    seen: Int[Array, " B"],
    *,
    head_dim: int,
    scale: float,
) -> Float[Array, "L M ND"]:
    """softmax(Q K^T * scale) V of rows in lines; zeros where there is no row, or a row without keys.

    Args:
        query, key, value: heads side by side in the last axis, float32.
        starts: the first token of each row, counted over all lines; ascending.
        counts: tokens of each row.
        seen: how many of them, the first ones, are keys.
        head_dim: H, a multiple of twice `lanes()`.
        scale: of the scores.
    """
    call = jax.ffi.ffi_call(TARGETS[1], jax.ShapeDtypeStruct(query.shape, jnp.float32))
    mixed: jax.Array = call(
        query, key, value, starts, counts, seen, head_dim=np.int32(head_dim), scale=np.float32(scale)
    )
    return mixed


@lru_cache(maxsize=1)
def host_cpu() -> str:
    """The CPU and what it can do: machine code for one may be illegal on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n", 1)[0].splitlines() if info.is_file() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    # XLA shares the work out among the cores that there are.
    return "\n".join([platform.machine(), platform.processor(), str(os.cpu_count()), *told])
