"""Which kernels there are beside XLA's on the devices of a mesh: looked for, tried against formulas, and timed."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxembed import cache, cpu_kernels
from jaxembed.kernels import Kernels
from jaxembed.layers import exact_gelu, linear
from jaxembed.sharding import platform

__all__ = ["cpu_tokens_on", "fused_width", "kernels_on"]

logger = logging.getLogger(__name__)

BUILDING = threading.Lock()

KIND = "cpu_kernels"
"""What libraries are called in the cache."""

TIMED = (16, 64, 128, 512)
"""Tokens of the products that are timed, up to those of the largest batch but for a single very long row."""

SIZE = (384, 1536)
"""Their input and output features."""

ALLOWED = 1e-5
"""The largest absolute error of results that are around 1."""

TIE = 1.05
"""Times of XLA's products that theirs may take."""


def kernels_on(mesh: Mesh, dtype: str) -> Kernels:
    """Find out what there is. Not while anything is traced: some are tried.

    Args:
        mesh: the devices.
        dtype: of the products' operands.
    """
    kind = platform(mesh)
    if kind == "gpu":
        return Kernels(mesh, fused=fused_width([device.compute_capability for device in mesh.devices.flat]))
    if kind == "tpu":
        # Only there: Pallas takes half a second and 22 MB.
        from jaxembed.row_attention import row_attention_works

        return Kernels(mesh, rows=row_attention_works(mesh.devices.flat[0], dtype))
    return Kernels(mesh, cpu_tokens=cpu_tokens_on(mesh, dtype))


def cpu_tokens_on(mesh: Mesh, dtype: str) -> int:
    """`Kernels.cpu_tokens` of a mesh; 0 where `cpu_kernels` are not made for it."""
    if platform(mesh) != "cpu" or mesh.size > 1 or dtype != "float32":
        return 0
    # Shapes are compiled by several threads: the others wait for the one that builds.
    with BUILDING, jax.default_device(mesh.devices.flat[0]):
        return cpu_tokens(cache.current())


def fused_width(capabilities: Sequence[str]) -> int:
    """Features of the widest head that cuDNN's fused attention takes; 0 if it takes none.

    Args:
        capabilities: of each GPU, such as "9.0".
    """
    least = min(map(float, capabilities))
    if least < 8.0:
        return 0
    return 128 if least < 9.0 else 256


@lru_cache(maxsize=1)
def cpu_tokens(kept: cache.Cache | None) -> int:
    """`Kernels.cpu_tokens` of this machine, with the library loaded if it is not 0.

    It is built once and kept in the cache, with what trying it gave in front. Without a cache it is not: to build and
    to try it takes longer than most scripts would gain.
    """
    if kept is None:
        return 0
    program = cpu_kernels.compiler()
    if program is None:
        return 0
    stat = program.stat()
    key = kept.key(KIND, cpu_kernels.host_cpu(), cpu_kernels.FLAGS, program, stat.st_size, stat.st_mtime_ns)
    found = kept.read(KIND, key)
    try:
        if found is not None:
            tokens = int.from_bytes(found[:2], "big")
            if tokens:
                cpu_kernels.load(found[2:])
            return tokens
        start = time.perf_counter()
        library = cpu_kernels.build(program)
        tokens = 0
        if library is not None:
            cpu_kernels.load(library)
            tokens = worth() if right() else 0
        logger.info("kernels for CPU: up to %d tokens, found out in %.1f s", tokens, time.perf_counter() - start)
    except OSError as error:
        logger.warning("the kernels for CPU cannot be loaded, XLA's are used: %s", error)
        return 0
    kept.write(KIND, key, tokens.to_bytes(2, "big") + (library or b""))
    return tokens


def right() -> bool:
    """Whether they give what their formulas say; the log says so if not."""
    random = np.random.default_rng(0)
    errors = []
    for tokens, depth, width in ((1, 32, 50), (29, 200, 150), (100, 768, 96)):
        sizes = ((tokens, depth), (width, depth), (width,))
        x, kernel, bias = (random.normal(size=size).astype(np.float32) for size in sizes)
        kernel /= depth**0.5
        wanted = exact_gelu(jnp.asarray(x.astype(np.float64) @ kernel.T.astype(np.float64) + bias, jnp.float32))
        (got,) = jax.jit(lambda *y: cpu_kernels.products(y[0][None], [(y[1], y[2])], "gelu"))(x, kernel, bias)
        errors.append(np.abs(np.asarray(got)[0] - np.asarray(wanted)).max())
    head = 2 * cpu_kernels.lanes()
    counts = np.array([1, 40, 17], np.int32)
    starts = np.array([0, 1, 41], np.int32)
    q, k, v = random.normal(size=(3, 1, 60, head)).astype(np.float32)
    call = jax.jit(lambda *y: cpu_kernels.attention(*y, head_dim=head, scale=head**-0.5))
    mixed = np.asarray(call(q, k, v, starts, counts, counts))[0]
    for start, count in zip(starts, counts, strict=True):
        row = slice(start, start + count)
        weights = np.exp(q[0, row].astype(np.float64) @ k[0, row].T / head**0.5)
        wanted = weights @ v[0, row] / weights.sum(axis=1, keepdims=True)
        errors.append(np.abs(mixed[row] - wanted).max())
    # NaN is no less than anything.
    worst = float(np.max(errors))
    if not worst <= ALLOWED:
        logger.warning("the kernels for CPU are off by %.1e, more than %.1e, and are not used", worst, ALLOWED)
        return False
    return True


def worth() -> int:
    """Tokens up to which products are faster than XLA's: the most of `TIMED` before one where they are not."""
    depth, width = SIZE
    bias = np.zeros(width, np.float32)
    # So many that their kernels are not all in a cache, as a model's are not.
    kernels = [jnp.full((width, depth), 0.01, jnp.float32) for _ in range(8)]
    best = 0
    for tokens in TIMED:
        x = np.ones((1, tokens, depth), np.float32)

        def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return cpu_kernels.products(x, [(kernel, jnp.asarray(bias))], "gelu")[0]

        def theirs(x: jax.Array, kernel: jax.Array) -> jax.Array:
            return exact_gelu(linear(x, kernel) + jnp.asarray(bias)[None, None])

        both = [compiled(product, x, kernels) for product in (ours, theirs)]
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(15):
            for call, taken in zip(both, times, strict=True):
                start = time.perf_counter()
                jax.block_until_ready(call(x, kernels))
                taken.append(time.perf_counter() - start)
        # The least that each took: what is above it is the machine's other work.
        if min(times[0]) > TIE * min(times[1]):
            break
        best = tokens
    return best


def compiled(product: Callable[[jax.Array, jax.Array], jax.Array], x: Any, kernels: list[jax.Array]) -> Any:
    """The products with all kernels, one after the other."""

    def all_of_them(x: jax.Array, kernels: list[jax.Array]) -> list[jax.Array]:
        results = []
        for kernel in kernels:
            # Each waits for the one before.
            x, result = jax.lax.optimization_barrier((x, product(x, kernel)))
            results.append(result)
        return results

    return jax.jit(all_of_them).lower(x, kernels).compile()
