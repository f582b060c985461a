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
import numpy.typing as npt
from jax.sharding import Mesh

from jaxembed import cache, cpu_kernels, cpu_library
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

ALLOWED = 1e-5
"""The largest absolute error of results that are around 1."""

TIE = 1.05
"""Times of XLA's that they may take."""

ROUNDS = 15
TRIES = 3
"""Refused if they take more in so many tries of so many rounds: work beside them holds them up more than XLA's."""

Numbers = npt.NDArray[Any]


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
        unit = ", by AMX" if tokens and dtype == "bfloat16" and as_xla_rounds(dtype) else ""
        logger.info("kernels for CPU in %s%s: up to %d tokens, found out in %.1f s", dtype, unit, tokens, seconds)
    except OSError as error:
        logger.warning("the kernels for CPU cannot be loaded, XLA's are used: %s", error)
        return 0
    kept.write(KIND, key, tokens.to_bytes(2, "big") + (library or b""))
    return tokens


def as_xla_rounds(dtype: str) -> bool:
    """Whether they multiply what XLA's products do: with matrices in bfloat16 those round the other operand too."""
    return dtype == "float32" or cpu_library.by_amx(SIZE[0])


def right(dtype: str) -> bool:
    """Whether they give what their formulas say; the log says so if not."""
    # NaN is no less than anything.
    worst = float(
        np.max([*wrong_in_products(dtype), *wrong_in_norms(dtype), *wrong_in_attention(dtype), *wrong_in_rows(dtype)])
    )
    if not worst <= ALLOWED:
        logger.warning("the kernels for CPU are off by %.1e, more than %.1e, and are not used", worst, ALLOWED)
        return False
    return True


def wrong_in_products(dtype: str) -> list[float]:
    """The largest error of each of some `products`."""
    errors = []
    for tokens, depth, width in ((1, 32, 50), (29, 224, 150), (100, 768, 96)):
        x, kernel, bias = product(dtype, tokens, depth, width)
        wanted = exact_gelu(jnp.asarray(x.astype(np.float64) @ kernel.T.astype(np.float64) + bias, jnp.float32))
        (got,) = jax.jit(lambda *y: cpu_kernels.products(y[0][None], [(y[1], y[2])], "gelu"))(x, kernel, bias)
        errors.append(float(np.abs(np.asarray(got)[0] - np.asarray(wanted)).max()))
    return errors


def wrong_in_norms(dtype: str) -> list[float]:
    """The same of a `linear_norm`, and of a `feed_forward` beside a product and that."""
    tokens, width, eps = 100, 96, 1e-5
    x, kernel, bias = product(dtype, tokens, width, width)
    scale, shift = product("float32", 2, width, 1)[0]
    identity = (jnp.eye(width, dtype=dtype), None)

    def norms(x: jax.Array, up: cpu_kernels.Product) -> tuple[jax.Array, ...]:
        (inner,) = cpu_kernels.products(x, [up], "gelu")
        norm = (jnp.asarray(scale), jnp.asarray(shift), eps)
        # What goes in is in that dtype; what is between may be rounded to it.
        single, double = (cpu_kernels.linear_norm(y, identity, x, norm) for y in (x, inner))
        return single, double, cpu_kernels.feed_forward(x, up, identity, "gelu", norm)

    single, double, layer = map(np.asarray, jax.jit(norms)(x[None], (kernel, bias)))
    wanted = np.asarray(layer_norm(jnp.asarray(2 * x), jnp.asarray(scale), jnp.asarray(shift), eps))
    return [float(np.abs(single[0] - wanted).max()), float(np.abs(layer - double).max())]


def wrong_in_attention(dtype: str) -> list[float]:
    """The same of each row of an `attention`."""
    head = 2 * cpu_library.lanes()
    counts = np.array([1, 40, 17], np.int32)
    starts = np.array([0, 1, 41], np.int32)
    q, k, v = np.random.default_rng(0).normal(size=(3, 1, 60, head)).astype(np.float32)
    scale = head**-0.5
    if dtype == "bfloat16":
        # Scores are whole numbers and weights are powers of two, which rounding leaves as they are.
        q, k, v, scale = np.sign(q), np.sign(k), v.astype(dtype).astype(np.float32), float(np.log(2.0))
    attention = jax.jit(lambda *y: cpu_kernels.attention(*y, head_dim=head, scale=scale, dtype=jnp.dtype(dtype)))
    mixed = np.asarray(attention(q, k, v, starts, counts, counts))[0]
    errors = []
    for start, count in zip(starts, counts, strict=True):
        row = slice(start, start + count)
        weights = np.exp(q[0, row].astype(np.float64) @ k[0, row].T * scale)
        wanted = weights @ v[0, row] / weights.sum(axis=1, keepdims=True)
        errors.append(float(np.abs(mixed[row] - wanted).max()))
    return errors


def wrong_in_rows(dtype: str) -> list[float]:
    """The same of an `embed` and of `totals`."""
    random = np.random.default_rng(0)
    width, rows, eps = 100, 3, 1e-5
    scale, shift = random.normal(size=(2, width)).astype(np.float32)
    tables = random.normal(size=(2, 9, width)).astype(dtype)
    ids = random.integers(0, 9, (2, rows, 11), np.int32)

    def embed(tables: jax.Array, ids: jax.Array) -> jax.Array:
        norm = (jnp.asarray(scale), jnp.asarray(shift), eps)
        return cpu_kernels.embed(list(zip(tables, ids, strict=True)), norm, shape=(rows, ids.shape[-1]))

    x = sum(table.astype(np.float32)[which] for table, which in zip(tables, ids, strict=True))
    embedded = np.asarray(layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(shift), eps))
    weights = random.normal(size=ids.shape[1:]).astype(np.float32)
    starts, counts = np.arange(rows, dtype=np.int32) * ids.shape[-1], np.full(rows, ids.shape[-1], np.int32)
    totals = np.einsum("BT,BTD->BD", weights, x)
    got = (jax.jit(embed)(tables, ids), jax.jit(cpu_kernels.totals)(x, weights, starts, counts))
    return [float(np.abs(np.asarray(y) - z).max()) for y, z in zip(got, (embedded, totals), strict=True)]


def product(dtype: str, tokens: int, depth: int, width: int) -> tuple[Numbers, Numbers, Numbers]:
    """x, kernel and bias of a product, of which what the kernels round is rounded, with results around 1."""
    random = np.random.default_rng(0)
    sizes = ((tokens, depth), (width, depth), (width,))
    x, kernel, bias = (random.normal(size=size).astype(np.float32) for size in sizes)
    x, kernel = (y.astype(dtype) for y in (x, kernel / np.float32(depth**0.5)))
    return x.astype(np.float32), kernel, bias


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
