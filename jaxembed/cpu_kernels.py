"""Products with weights and attention in C++, for one CPU, called by XLA's executables.

XLA's matrix product on CPU repacks one of its operands at every call, which few tokens do not repay, and its attention
over short rows is many small steps. The source, in `cpp`, is compiled on the machine it runs on, by that
machine's C++ compiler, which knows the vectors that there are; without one everything is XLA's (docs/performance.md).
Letters in shapes are those of `layers` and `tokens`.

Each can be told how many tokens there are, of all lines together: what stands behind them is not looked at, and in the
result anything may stand there.
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

__all__ = [
    "DTYPES",
    "Norm",
    "Product",
    "attention",
    "build",
    "by_amx",
    "compiler",
    "feed_forward",
    "host_cpu",
    "lanes",
    "linear_norm",
    "load",
    "products",
    "running",
]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cpp" / "calls.cpp"
FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-shared", "-pthread"),
)
TARGETS = ("jaxembed_linear", "jaxembed_linear_norm", "jaxembed_feed_forward", "jaxembed_attention")
FUNCTIONS = (
    ("jaxembed_lanes", ctypes.c_int64, 0),
    ("jaxembed_room", ctypes.c_int64, 2),
    ("jaxembed_amx", ctypes.c_bool, 1),
)
"""Others that are called from here, their results, and how many integers they are given."""

NEEDED = ("avx2", "fma")
"""What a CPU must be able to do, as Linux calls it. On others nothing was measured."""

DTYPES = ("float32", "bfloat16")
"""Of kernels that are taken."""

ACTIVATIONS: Mapping[str | None, int] = {None: 0, "gelu": 1}
"""Functions that a product can end with, by Hugging Face's names, and their numbers in the source."""

Product = tuple[Float[Array, "N K"], Float[Array, " N"] | None]
"""A kernel and its bias."""

Count = Int[Array, ""] | None
"""How many tokens there are, the first ones; None: all."""

Norm = tuple[Float[Array, " N"], Float[Array, " N"] | None, float]
"""Scale and bias of a LayerNorm, and what it adds to the variance."""


def compiler(dtype: str) -> Path | None:
    """The C++ compiler for this machine: $CXX, or `c++`; None if there is none, or nothing to do in that dtype."""
    if dtype not in DTYPES or platform.machine() != "x86_64":
        return None
    if not all(f" {flag} " in f"{host_cpu()} " for flag in NEEDED):
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
    for name, result, arguments in FUNCTIONS:
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, [ctypes.c_int64] * arguments
    _loaded = loaded


def library() -> ctypes.PyDLL:
    """What is loaded.

    Raises:
        RuntimeError: nothing is.
    """
    if _loaded is None:
        raise RuntimeError("the kernels for CPU are not loaded")
    return _loaded


def lanes() -> int:
    """Numbers of a vector: heads must have a multiple of twice as many features.

    Raises:
        RuntimeError: nothing is loaded.
    """
    return int(library().jaxembed_lanes())


def by_amx(depth: int) -> bool:
    """Whether products in bfloat16 with so many input features are the matrix unit's; else they are the vectors'.

    It takes multiples of 32, and rounds inputs to bfloat16; vectors multiply in float32.

    Raises:
        RuntimeError: nothing is loaded.
    """
    return bool(library().jaxembed_amx(depth))


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
    x: Float[Array, "L M K"],
    matrices: Sequence[Product],
    activation: str | None = None,
    *,
    tokens: Count = None,
) -> tuple[Float[Array, "L M _"], ...]:
    """activation(x @ kernel^T + bias) of each matrix, float32; x is rounded to bfloat16 where `by_amx`.

    Args:
        x: float32.
        matrices: kernels, [output, input], all in one of `DTYPES`, and their biases.
        activation: one of `ACTIVATIONS`.
    """
    shapes = [(*x.shape[:-1], kernel.shape[0]) for kernel, _ in matrices]
    call = jax.ffi.ffi_call(TARGETS[0], [*map(written, shapes), room(x, x.shape[-1])])
    operands = (x, counted(x, tokens), *(array for one in matrices for array in with_bias(one)))
    results: Sequence[jax.Array] = call(*operands, activation=np.int32(ACTIVATIONS[activation]))
    return tuple(results[:-1])


def linear_norm(
    x: Float[Array, "L M K"], matrix: Product, residual: Float[Array, "L M N"], norm: Norm, *, tokens: Count = None
) -> Float[Array, "L M N"]:
    """norm(residual + x @ kernel^T + bias), as one of `products` and a LayerNorm.

    Args:
        x, residual: float32.
        matrix: kernel, [output, input], in one of `DTYPES`, and bias.
        norm: of the sum.
    """
    call = jax.ffi.ffi_call(TARGETS[1], [written(residual.shape), room(x, x.shape[-1])])
    operands = (x, counted(x, tokens), *with_bias(matrix), residual, *with_bias(norm[:2]))
    results: Sequence[jax.Array] = call(*operands, eps=np.float32(norm[2]))
    return results[0]


def feed_forward(
    x: Float[Array, "L M N"],
    up: tuple[Float[Array, "F N"], Float[Array, " F"] | None],
    down: tuple[Float[Array, "N F"], Float[Array, " N"] | None],
    activation: str | None,
    norm: Norm,
    *,
    tokens: Count = None,
) -> Float[Array, "L M N"]:
    """norm(x + activation(x @ up^T + its bias) @ down^T + its bias), without what is between.

    Args:
        x: float32.
        up, down: kernels, [output, input], both in one of `DTYPES`, and their biases.
        activation: one of `ACTIVATIONS`.
        norm: of the sum.
    """
    call = jax.ffi.ffi_call(TARGETS[2], [written(x.shape), room(x, sum(down[0].shape))])
    operands = (x, counted(x, tokens), *with_bias(up), *with_bias(down), *with_bias(norm[:2]))
    options = {"activation": np.int32(ACTIVATIONS[activation]), "eps": np.float32(norm[2])}
    results: Sequence[jax.Array] = call(*operands, **options)
    return results[0]


def written(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """An array that is given back."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def with_bias(one: tuple[jax.Array, jax.Array | None]) -> tuple[jax.Array, jax.Array]:
    """Kernel or scale, and bias; one that is not there has no numbers."""
    first, bias = one
    return first, jnp.zeros(0, jnp.float32) if bias is None else bias


def counted(x: Float[Array, "L M K"], tokens: Count) -> Int[Array, " 1"]:
    """How many tokens there are, as the calls are told."""
    return jnp.full(1, x.shape[0] * x.shape[1], jnp.int32) if tokens is None else tokens.astype(jnp.int32).reshape(1)


def room(x: Float[Array, "L M K"], depth: int) -> jax.ShapeDtypeStruct:
    """For so many features of each token, as a kernel lays them."""
    return written((int(library().jaxembed_room(x.shape[0] * x.shape[1], depth)),))


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
    dtype: jnp.dtype,
    tokens: Count = None,
) -> Float[Array, "L M ND"]:
    """softmax(Q K^T * scale) V of rows in lines; zeros where there is no row, or a row without keys.

    Args:
        query, key, value: heads side by side in the last axis, float32.
        starts: the first token of each row, counted over all lines; ascending.
        counts: tokens of each row.
        seen: how many of them, the first ones, are keys.
        head_dim: H, a multiple of twice `lanes()`.
        scale: of the scores.
        dtype: "bfloat16" lets operands of the products be rounded to that, as they are for many keys with AMX.
    """
    call = jax.ffi.ffi_call(TARGETS[3], written(query.shape))
    options = {"half": np.int32(dtype == jnp.bfloat16), "head_dim": np.int32(head_dim), "scale": np.float32(scale)}
    mixed: jax.Array = call(query, key, value, starts, counts, seen, counted(query, tokens), **options)
    return mixed


@lru_cache(maxsize=1)
def host_cpu() -> str:
    """The CPU and what it can do: machine code for one may be illegal on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n", 1)[0].splitlines() if info.is_file() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    # XLA shares the work out among the cores that there are.
    return "\n".join([platform.machine(), platform.processor(), str(os.cpu_count()), *told])
