"""Which kernels there are beside XLA's on the devices of a mesh: looked for, tried against formulas, and timed."""

import logging
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxembed import cache, cpu_kernels, cpu_library
from jaxembed.kernel_checks import right
from jaxembed.kernels import Kernels
from jaxembed.layers import exact_gelu, layer_norm, linear
from jaxembed.sharding import platform

__all__ = ["cpu_tokens_on", "fused_width", "kernels_on"]

logger = logging.getLogger(__name__)

BUILDING = threading.Lock()

KIND = "cpu_kernels"
"""What libraries are called in the cache."""

TIMED = (32, 128, 512)
"""Tokens of what is timed, up to those of the largest batch but for a single very long row."""

SIZE = (384, 1536)
"""Features of a token, and of the feed-forward between."""

TIE = 1.05
"""Times of XLA's that they may take."""

ROUNDS = 15
TRIES = 3
"""Refused if they take more in so many tries of so many rounds: work beside them holds them up more than XLA's."""


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
    if platform(mesh) != "cpu" or mesh.size > 1:
        return 0
    # Shapes are compiled by several threads: the others wait for the one that builds.
    with BUILDING, jax.default_device(mesh.devices.flat[0]):
        return cpu_tokens(cache.current(), dtype)


def fused_width(capabilities: Sequence[str]) -> int:
    """Features of the widest head that cuDNN's fused attention takes; 0 if it takes none.

    Args:
        capabilities: of each GPU, such as "9.0".
    """
    least = min(map(float, capabilities))
    if least < 8.0:
        return 0
    return 128 if least < 9.0 else 256


@lru_cache(maxsize=len(cpu_library.DTYPES))
def cpu_tokens(kept: cache.Cache | None, dtype: str) -> int:
    """`Kernels.cpu_tokens` of this machine, with the library loaded if it is not 0.

    It is built once for a dtype and kept in the cache, with what trying it gave in front. Without a cache it is not: to
    build and to try it takes longer than most scripts would gain.
    """
    if kept is None:
        return 0
    program = cpu_library.compiler(dtype)
    if program is None:
        return 0
    stat = program.stat()
    key = kept.key(KIND, dtype, cpu_library.host_cpu(), cpu_library.FLAGS, program, stat.st_size, stat.st_mtime_ns)
    found = kept.read(KIND, key)
    try:
        if found is not None:
            tokens = int.from_bytes(found[:2], "big")
            if tokens:
                cpu_library.load(found[2:])
            return tokens
        start = time.perf_counter()
        library = cpu_library.build(program)
        tokens = 0
        if library is not None:
            cpu_library.load(library)
            tokens = worth(dtype) if right(dtype) else 0
            if tokens < TIMED[-1] and not as_xla_rounds(dtype):
                # A text must not have one vector in a small batch and another in a large one.
                tokens = 0
        seconds = time.perf_counter() - start
        kind = ", inputs rounded" if tokens and dtype == "bfloat16" and as_xla_rounds(dtype) else ""
        logger.info("kernels for CPU in %s%s: up to %d tokens, found out in %.1f s", dtype, kind, tokens, seconds)
    except OSError as error:
        logger.warning("the kernels for CPU cannot be loaded, XLA's are used: %s", error)
        return 0
    kept.write(KIND, key, tokens.to_bytes(2, "big") + (library or b""))
    return tokens


def as_xla_rounds(dtype: str) -> bool:
    """Whether they multiply what XLA's products do: with matrices in bfloat16 those round the other operand too."""
    return dtype == "float32" or cpu_library.in_pairs(SIZE[0])


def worth(dtype: str) -> int:
    """Tokens up to which a feed-forward is faster than XLA's: the most of `TIMED` before one where it is not."""
    depth, width = SIZE
    up, down = ((jnp.full(size, 0.01, dtype), jnp.zeros(size[0])) for size in ((width, depth), (depth, width)))
    # So many that their kernels are not all in a cache, as a model's are not.
    layers = [jax.tree.map(jnp.copy, (up, down, jnp.ones(depth))) for _ in range(4)]
    best = 0
    for tokens in TIMED:
        x = np.ones((1, tokens, depth), np.float32)
        both = [compiled(layer, x, layers) for layer in (ours, theirs)]
        if all(compared(both, x, layers) > TIE for _ in range(TRIES)):
            break
        best = tokens
    return best


def compared(both: Sequence[Callable[..., Any]], x: Any, layers: Sequence[Any]) -> float:
    """What the first of two takes in parts of the second's time: the median over rounds, each of one and the other."""
    ratios = []
    for _ in range(ROUNDS):
        taken = []
        for call in both:
            start = time.perf_counter()
            jax.block_until_ready(call(x, layers))
            taken.append(time.perf_counter() - start)
        ratios.append(taken[0] / taken[1])
    return statistics.median(ratios)


Layer = tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array], jax.Array]
"""The two matrices of a feed-forward, each with a bias, and the scale of the norm that follows."""

EPS = 1e-12


def ours(x: jax.Array, layer: Layer) -> jax.Array:
    """A feed-forward by `cpu_kernels`."""
    up, down, scale = layer
    return cpu_kernels.feed_forward(x, up, down, "gelu", (scale, None, EPS))


def theirs(x: jax.Array, layer: Layer) -> jax.Array:
    """The same as XLA compiles it."""
    (up, up_bias), (down, down_bias), scale = layer
    y = x + linear(exact_gelu(linear(x, up) + up_bias[None, None]), down) + down_bias[None, None]
    return layer_norm(y, scale, None, EPS)


def compiled(layer: Callable[[jax.Array, Layer], jax.Array], x: Any, layers: list[Layer]) -> Any:
    """The layers one after the other."""

    def all_of_them(x: jax.Array, layers: list[Layer]) -> list[jax.Array]:
        results = []
        for one in layers:
            # Each waits for the one before.
            x, result = jax.lax.optimization_barrier((x, layer(x, one)))
            results.append(result)
        return results

    return jax.jit(all_of_them).lower(x, layers).compile()
