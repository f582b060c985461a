"""Attention in one kernel for TPU: scores never leave the chip, and heads stay side by side as products leave them.

XLA writes scores, and heads apart from each other, each padded to tiles of 8 x 128: heads of 32 features take four
times their bytes. Here a step takes whole rows and the features of a few heads. Short rows share a product of 128
tokens and are hidden from each other; heads narrower than 128 features share it too, each with those of the others set
to 0: the matrix unit is that wide in any case. Letters in shapes are those of `layers`; C tokens and G features of a
step.

Written in Pallas (https://docs.jax.dev/en/latest/pallas/tpu/index.html).
"""

import logging
import threading
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.experimental import pallas
from jax.experimental.pallas import tpu
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxembed.layers import MASKED, matmul
from jaxembed.sharding import DATA, MODEL, make_mesh

__all__ = ["row_attention", "row_attention_takes", "row_attention_works"]

logger = logging.getLogger(__name__)

TRYING = threading.Lock()

LANES = 128
"""Features of a register and of the matrix unit, and tokens of a product."""

TILE = 16
"""Tokens of a tile in bfloat16; in float32 half as many."""

STEP_TOKENS = 1024
"""Tokens of a step, if a row has no more: each takes time to begin."""

WIDEST = 256
"""Features of the widest head."""

ROW_BYTES = 4096
"""Of a feature in the longest row: so much that keys, values, scores and the next step's still fit on the chip."""

Ends = list[Int[Array, ""]]
"""Where the keys of each of some rows, one behind another, that may be seen end."""


def row_attention_takes(length: int, heads: tuple[int, int], width: int, dtype: jnp.dtype, mesh: Mesh) -> bool:
    """Whether the kernel takes rows of so many tokens, with so many heads, of queries and of keys, so wide.

    Rows fill tiles; a step holds whole rows and whole heads; heads that share a step have each their own keys; and no
    device holds a part of the heads.
    """
    num_heads, kv_heads = heads
    if length % TILE or length * dtype.itemsize > ROW_BYTES or mesh.shape[MODEL] > 1:
        return False
    if width % LANES == 0:
        return width <= WIDEST
    return LANES % width == 0 and num_heads == kv_heads and num_heads * width % LANES == 0


def row_attention(
    query: Float[Array, "B T ND"],
    key: Float[Array, "B T KD"],
    value: Float[Array, "B T KD"],
    mask: Bool[Array, "B T"],
    *,
    heads: tuple[int, int],
    dtype: jnp.dtype,
    scale: float,
    causal: bool,
    window: int | None,
    mesh: Mesh,
) -> Float[Array, "B T ND"]:
    """softmax(Q K^T * scale) V over the keys of the mask; see `row_attention_takes`.

    Args:
        query, key, value: heads side by side in the last axis.
        mask: the first keys of each row, which may be seen; what a row of none gives is finite.
        heads: of the queries, and of keys and values.
        dtype: of the products' operands.
        scale: what scores are multiplied by.
        causal: a query sees no key behind its own place.
        window: a query sees keys at most this many places away.
        mesh: its devices share the rows.

    Returns:
        float32, heads side by side again.
    """
    call = partial(on_device, heads=heads, scale=scale, causal=causal, window=window)
    if mesh.size > 1:
        rows = PartitionSpec(DATA)
        call = jax.shard_map(call, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows, check_vma=False)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.int32)
    return call(query.astype(dtype), key.astype(dtype), value.astype(dtype), lengths).astype(jnp.float32)


def on_device(
    query: Float[Array, "B T ND"],
    key: Float[Array, "B T KD"],
    value: Float[Array, "B T KD"],
    lengths: Int[Array, " B"],
    *,
    heads: tuple[int, int],
    scale: float,
    causal: bool,
    window: int | None,
) -> Float[Array, "B T ND"]:
    """`row_attention` of one device's rows, in the dtype of its operands."""
    batch, length, features = query.shape
    num_heads, kv_heads = heads
    width = features // num_heads
    group = max(width, LANES)
    most = max(STEP_TOKENS // length, 1)
    rows = max(count for count in range(1, min(batch, most) + 1) if batch % count == 0)
    step = pallas.BlockSpec((rows * length, group), lambda i, j, _: (i, j))
    # Where there are fewer heads of keys, each meets the queries of several.
    shared = pallas.BlockSpec((rows * length, group), lambda i, j, _: (i, j * kv_heads // num_heads))
    scores = batch * length * max(length, min(LANES, rows * length)) * num_heads
    result: jax.Array = pallas.pallas_call(
        partial(attend, length=length, width=width, scale=scale, causal=causal, window=window),
        out_shape=jax.ShapeDtypeStruct((batch * length, features), query.dtype),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch // rows, features // group),
            in_specs=[step, shared, shared],
            out_specs=step,
        ),
        compiler_params=tpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pallas.CostEstimate(
            flops=4 * scores * group,
            transcendentals=scores,
            bytes_accessed=2 * (query.size + key.size) * query.dtype.itemsize,
        ),
    )(lengths, *(x.reshape(batch * length, -1) for x in (query, key, value)))
    return result.reshape(query.shape)


def attend(
    lengths_ref: Any,
    query_ref: Any,
    key_ref: Any,
    value_ref: Any,
    result_ref: Any,
    *,
    length: int,
    width: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> None:
    """One step: some rows, and the heads of a group of features. References are [B] and [C, G]."""
    rows, together = query_ref.shape[0] // length, max(LANES // length, 1)
    first_row = pallas.program_id(0) * rows
    for row in range(0, rows, together):
        count = min(together, rows - row)
        span = pallas.ds(row * length, count * length)
        attend_rows(
            query_ref.at[span, :],
            key_ref[span, :],
            value_ref[span, :],
            result_ref.at[span, :],
            [n * length + lengths_ref[first_row + row + n] for n in range(count)],
            length=length,
            width=width,
            scale=scale,
            causal=causal,
            window=window,
        )


def attend_rows(
    query_ref: Any,
    keys: Shaped[Array, "S G"],
    values: Shaped[Array, "S G"],
    result_ref: Any,
    ends: Ends,
    *,
    length: int,
    width: int,
    scale: float,
    causal: bool,
    window: int | None,
) -> None:
    """One row, or several short ones one behind another, which see their own keys alone. References are [S, G]."""

    def attend_from(begin: int | jax.Array, size: int) -> None:
        place = pallas.ds(begin, size)
        seen = visible(begin, size, length, ends, causal, window)
        result_ref[place, :] = mixed(query_ref[place, :], keys, values, seen, width, scale).astype(result_ref.dtype)

    full, left = divmod(len(ends) * length, LANES)
    if full > 1:
        # In a loop of the program: written out, each round would have a place of its own for its scores.
        jax.lax.fori_loop(0, full, lambda n, _: attend_from(n * LANES, LANES), None)
    elif full:
        attend_from(0, LANES)
    if left:
        attend_from(full * LANES, left)


def visible(
    begin: int | jax.Array, size: int, length: int, ends: Ends, causal: bool, window: int | None
) -> Bool[Array, "T S"]:
    """Which keys of rows of `length` tokens, one behind another, `size` queries from `begin` on see."""
    keys = len(ends) * length
    query = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) + begin
    key = jax.lax.broadcasted_iota(jnp.int32, (1, keys), 1)
    # Rows by comparisons, since the vector unit does not divide, and of one line each: of all pairs there are many.
    row_of_query = jnp.zeros((size, 1), jnp.int32)
    row_of_key = jnp.full((1, keys), -1, jnp.int32)
    for row, end in enumerate(ends):
        start = row * length
        row_of_query = jnp.where(query >= start, row, row_of_query)
        row_of_key = jnp.where((key >= start) & (key < end), row, row_of_key)
    seen = row_of_query == row_of_key
    if causal:
        seen = seen & (key <= query)
    if window is not None:
        seen = seen & (key >= query - window) & (key <= query + window)
    return seen


def mixed(
    queries: Float[Array, "T G"],
    keys: Float[Array, "S G"],
    values: Float[Array, "S G"],
    seen: Bool[Array, "T S"],
    width: int,
    scale: float,
) -> Float[Array, "T G"]:
    """Attention of the heads that stand in a group of features, in float32."""
    feature = jax.lax.broadcasted_iota(jnp.int32, queries.shape, 1)
    result = jnp.zeros(queries.shape, jnp.float32)
    for start in range(0, queries.shape[1], width):
        own = (feature >= start) & (feature < start + width)
        asked = queries if width == queries.shape[1] else jnp.where(own, queries, jnp.zeros_like(queries))
        scores = jnp.where(seen, matmul("TG,SG->TS", asked, keys, keys.dtype) * scale, MASKED)
        weights = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        total = jnp.sum(weights, axis=1, keepdims=True)
        head = matmul("TS,SG->TG", weights, values, values.dtype) / total
        result = jnp.where(own, head, result)
    return result


def row_attention_works(device: jax.Device, dtype: str) -> bool:
    """Whether the kernel gives on a TPU what its formula says; tried once for each. Not while anything is traced."""
    # Shapes are compiled by several threads: the others wait for the one that tries.
    with TRYING:
        return tried(device, dtype)


@lru_cache
def tried(device: jax.Device, dtype: str) -> bool:
    """See `row_attention_works`.

    The kernel is compiled for what there is when it runs, by a compiler that this project does not choose; where that
    goes wrong, attention is left to XLA, and the log says so.
    """
    try:
        worst = float(np.max([error(device, dtype, *kind) for kind in KINDS]))
    except Exception as failure:  # Whatever a compiler raises about a kernel that it does not take.
        logger.warning("attention's kernel does not run on %s and is not used: %s", device.device_kind, failure)
        return False
    allowed = ALLOWED[dtype]
    # NaN is no less than anything.
    works = worst <= allowed
    if not works:
        message = "attention's kernel is off by %.1e in %s on %s, more than %.1e, and is not used"
        logger.warning(message, worst, dtype, device.device_kind, allowed)
    return works


ALLOWED = {"float32": 1e-5, "bfloat16": 0.05}
"""dtype -> the largest absolute error of standard normal values."""

KINDS = (
    (16, 4, 4, 32, False, None),
    (176, 2, 2, 64, True, 30),
    (64, 4, 2, 128, True, None),
)
"""Tokens of a row, heads, heads of keys, features of each, causal, window: of what is tried."""


def error(
    device: jax.Device,
    dtype: str,
    length: int,
    num_heads: int,
    kv_heads: int,
    width: int,
    causal: bool,
    window: int | None,
) -> float:
    """Largest absolute difference of the kernel from its formula in float64, of rows of several lengths."""
    random = np.random.default_rng(length)
    lengths = np.array([length, 1, length // 2, length - 3, length, 7, 9, 5, 2], np.int32)
    query, key, value = (
        random.normal(size=(len(lengths), length, count * width)).astype(jnp.dtype(dtype))
        for count in (num_heads, kv_heads, kv_heads)
    )
    mesh = make_mesh([device])
    call = partial(
        row_attention,
        heads=(num_heads, kv_heads),
        dtype=jnp.dtype(dtype),
        scale=width**-0.5,
        causal=causal,
        window=window,
        mesh=mesh,
    )
    mask = np.arange(length) < lengths[:, None]
    operands = jax.device_put((*(x.astype(np.float32) for x in (query, key, value)), mask), device)
    got = np.asarray(jax.jit(call)(*operands))
    apart = []
    for row, count in enumerate(lengths):
        q, k, v = (x[row, :count].astype(np.float64) for x in (query, key, value))
        apart.append(np.abs(got[row, :count] - formula(q, k, v, num_heads, width, causal, window)).max())
    return float(np.max(apart))


def formula(
    query: npt.NDArray[np.float64],
    key: npt.NDArray[np.float64],
    value: npt.NDArray[np.float64],
    num_heads: int,
    width: int,
    causal: bool,
    window: int | None,
) -> npt.NDArray[np.float64]:
    """Attention of one row without padding, [T, ND], as it is written."""
    split = (x.reshape(len(x), -1, width).swapaxes(0, 1) for x in (query, key, value))
    q, *kv = split
    k, v = (x.repeat(num_heads // len(x), axis=0) for x in kv)
    scores = q @ k.swapaxes(1, 2) * width**-0.5
    distance = np.arange(len(key))[None, :] - np.arange(len(query))[:, None]
    hidden = (causal & (distance > 0)) | (np.abs(distance) > (len(key) if window is None else window))
    weights = np.exp(np.where(hidden, -np.inf, scores) - scores.max(axis=2, keepdims=True))
    mix: npt.NDArray[np.float64] = weights / weights.sum(axis=2, keepdims=True) @ v
    return mix.swapaxes(0, 1).reshape(query.shape)
