"""The library of `cpu_kernels`: compiled for the machine it runs on, loaded, and asked.

Its source, in `cpp`, is compiled on that machine, by its C++ compiler, which knows the vectors that there are; without
one everything is XLA's (docs/performance.md).
"""

import ctypes
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import jax

__all__ = ["DTYPES", "Target", "build", "compiler", "host_cpu", "in_pairs", "lanes", "load", "room", "running"]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cpp" / "calls.cpp"
FLAGS = (
    *("-std=c++17", "-O2", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-shared", "-pthread", "-Wl,-Bsymbolic"),
)
FUNCTIONS = (
    ("jaxembed_lanes", ctypes.c_int64, 0),
    ("jaxembed_room", ctypes.c_int64, 2),
    ("jaxembed_in_pairs", ctypes.c_bool, 1),
)
"""Others that are called from here, their results, and how many integers they are given."""

NEEDED = ("avx2", "fma")
"""What a CPU must be able to do, as Linux calls it. On others nothing was measured."""

DTYPES = ("float32", "bfloat16")
"""Of kernels that are taken."""


class Target(StrEnum):
    """Functions of it that XLA's executables call."""

    LINEAR = "jaxembed_linear"
    LINEAR_NORM = "jaxembed_linear_norm"
    FEED_FORWARD = "jaxembed_feed_forward"
    GATED_FEED_FORWARD = "jaxembed_gated_feed_forward"
    ATTENTION = "jaxembed_attention"
    EMBED = "jaxembed_embed"
    TOTALS = "jaxembed_totals"


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
    for target in Target:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, target)), platform="cpu")
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


def in_pairs(depth: int) -> bool:
    """Whether products in bfloat16 with so many input features take them two at a time, rounded to bfloat16 as well.

    So they do with a multiple of 32, if the CPU multiplies bfloat16 (AVX512_BF16 or AMX); else inputs are multiplied in
    float32.

    Raises:
        RuntimeError: nothing is loaded.
    """
    return bool(library().jaxembed_in_pairs(depth))


def room(tokens: int, features: int) -> int:
    """Numbers in float32 that so many tokens need room for, as the kernels lay them.

    Raises:
        RuntimeError: nothing is loaded.
    """
    return int(library().jaxembed_room(tokens, features))


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


@lru_cache(maxsize=1)
def host_cpu() -> str:
    """The CPU and what it can do: machine code for one may be illegal on another."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().split("\n\n", 1)[0].splitlines() if info.is_file() else []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    # XLA shares the work out among the cores that there are.
    return "\n".join([platform.machine(), platform.processor(), str(os.cpu_count()), *told])
