"""What is compiled for a shape: a program that is pure in (flat weights, a batch's table), and what XLA is told."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxembed.attention import FUSED_LENGTH
from jaxembed.kernel_choice import kernels_on
from jaxembed.kernels import Kernels, Line, right_padded
from jaxembed.model import Model
from jaxembed.packing import empty
from jaxembed.sharding import batch_sharding, platform
from jaxembed.tokens import Rows, Tokens
from jaxembed.types import Bucket, Column, Output, input_ids, told

__all__ = ["compile_shape", "compiler_options", "lower"]


def compile_shape(model: Model, output: Output, bucket: Bucket) -> Any:
    """The executable of one shape, compiled now; the weights' shapes and shardings are enough."""
    lowered = lower(model, output, bucket, kernels_on(model.mesh, model.dtype))
    return lowered.compile(compiler_options=compiler_options(model.dtype, platform(model.mesh), bucket))


def lower(model: Model, output: Output, bucket: Bucket, kernels: Kernels) -> Any:
    """The program of one shape for a model's mesh; the weights' shapes and shardings are enough."""
    table = empty(bucket).table
    spec = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=batch_sharding(model.mesh, table.ndim))
    leaves = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in model.leaves)
    function = partial(forward, model, output, bucket, kernels)
    ndim = 3 if output is Output.TOKENS else 2
    return jax.jit(function, out_shardings=batch_sharding(model.mesh, ndim)).lower(leaves, spec)


def compiler_options(dtype: str, kind: str, bucket: Bucket) -> dict[str, bool] | None:
    """What XLA is told for one shape on devices of a kind.

    On a GPU it tries out many kernels of Triton for each product, for half a minute a shape in float32, and ends up no
    faster than with the library's (docs/performance.md); but for attention over a few tokens in bfloat16.
    """
    if kind != "gpu":
        return None
    return {"xla_gpu_enable_triton_gemm": dtype == "bfloat16" and bucket.seq_len < FUSED_LENGTH}


def forward(
    model: Model,
    output: Output,
    bucket: Bucket,
    kernels: Kernels,
    leaves: tuple[jax.Array, ...],
    table: Int[Array, "_ _"],
) -> Float[Array, "B *shape"]:
    """What each executable computes of `Batch.table`."""
    row = dict(zip(Column, told(bucket, table).T, strict=True))
    length, seen, line = bucket.seq_len, row[Column.LENGTH], None
    if bucket.flat:
        rows = Rows.in_line(row[Column.TOKENS], seen, tokens=bucket.flat, length=length)
        line = Line(bucket.flat, rows.total_tokens)
    else:
        rows = Rows(jnp.arange(length, dtype=jnp.int32)[None] < seen[:, None])
    seconds = rows.each(row[Column.SECOND_START])
    tokens = Tokens(
        input_ids=input_ids(bucket, table),
        token_types=((seconds > 0) & (rows.places >= seconds)).astype(jnp.int32),
        tasks=row[Column.TASK],
        rows=rows,
    )
    normalize = row[Column.NORMALIZE] > 0
    with right_padded(kernels, line):
        return model.compute(output, leaves, tokens, row[Column.PROMPT_LENGTH], row[Column.DIMENSIONS], normalize)
