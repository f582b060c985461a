"""What only a GPU computes: cuDNN's attention in real executables. `make test-gpu` runs it, `make test` does not."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import cosines

from jaxembed import Bucket, Embedder, Ladder, make_mesh
from jaxembed.attention import FUSED_LENGTH, attention
from jaxembed.kernel_choice import kernels_on
from jaxembed.kernels import right_padded
from jaxembed.packing import Row, pack
from jaxembed.tokens import Rows
from jaxembed.types import Batch, Encoding
from jaxembed.warmup import warm

KERNEL = "__cudnn$fmha"
"""How XLA's program calls cuDNN's attention."""


def batch_of(bucket: Bucket) -> Batch:
    """A row as long as the shape, two short ones, and others of all lengths; the last is padding."""
    random = np.random.default_rng(bucket.seq_len)
    lengths = [bucket.seq_len, 1, 2, *random.integers(3, bucket.seq_len, bucket.batch_size - 4)]
    texts = [Encoding(random.integers(1000, 30_000, count, np.int32)) for count in lengths]
    return pack(bucket, [Row(text, 384, True, i) for i, text in enumerate(texts)])


@pytest.mark.parametrize("length", [FUSED_LENGTH, 100, 167, 256])
def test_minilm_with_fused_attention(minilm_folder: Path, length: int) -> None:
    """Rows of all lengths, and one of padding: as in float32, within what bfloat16 gives; no NaN."""
    bucket = Bucket(16, length)
    got = {}
    for dtype in ("float32", "bfloat16"):
        embedder = Embedder.from_pretrained(minilm_folder, dtype=dtype, ladder=Ladder([bucket]))
        engine = embedder.engine
        assert engine.platform == "gpu"
        engine.compile(bucket)
        got[dtype] = engine.run(batch_of(bucket))
        program = engine._executables[bucket].as_text()
        assert (KERNEL in program) == (dtype == "bfloat16")
    assert np.isfinite(got["bfloat16"]).all()
    assert cosines(got["bfloat16"], got["float32"]).min() >= 0.9998


@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "options"),
    [
        (4, 4, 64, {}),
        (4, 2, 128, {"causal": True}),
        (4, 1, 64, {"causal": True, "window": 20}),
        (3, 1, 256, {}),
        (3, 1, 256, {"causal": True}),
        (4, 4, 64, {"window": 199, "scale": 0.2}),
    ],
)
@pytest.mark.parametrize("length", [FUSED_LENGTH, 77, 200])
def test_each_kind_of_fused_attention(
    heads: int, kv_heads: int, width: int, options: dict[str, Any], length: int
) -> None:
    """Of a row's own tokens it gives what XLA's products give in float32, within what bfloat16 does to them."""
    random = np.random.default_rng(length)
    q = random.normal(size=(5, length, heads * width)).astype(np.float32)
    k, v = random.normal(size=(2, 5, length, kv_heads * width)).astype(np.float32)
    lengths = np.array([length, 1, 2, length // 2, 0])
    mask = np.arange(length) < lengths[:, None]
    call = partial(attention, num_heads=heads, num_key_value_heads=kv_heads, **options)
    wanted = np.asarray(jax.jit(partial(call, dtype=jnp.dtype("float32")))(q, k, v, Rows(mask)))
    with right_padded(kernels_on(make_mesh(jax.devices()[:1]), "bfloat16")):
        fused = jax.jit(partial(call, dtype=jnp.dtype("bfloat16"))).lower(q, k, v, Rows(mask)).compile()
    assert KERNEL in fused.as_text()
    got = np.asarray(fused(q, k, v, Rows(mask)))
    assert np.isfinite(got).all()
    np.testing.assert_allclose(got[mask], wanted[mask], atol=0.05)


def test_shapes_are_compiled_beside_runs(minilm_folder: Path) -> None:
    """As a server does once it has chosen its shapes anew: no run fails, and none gives anything else meanwhile."""
    running = [Bucket(16, length) for length in (16, FUSED_LENGTH, 128)]
    others = [Bucket(size, length) for size in (4, 24) for length in range(FUSED_LENGTH, 257, 48)]
    embedder = Embedder.from_pretrained(minilm_folder, dtype="bfloat16", ladder=Ladder([*running, *others]))
    engine = embedder.engine
    warm(engine, Ladder(running))
    batches = [batch_of(bucket) for bucket in running]
    wanted = [engine.run(batch) for batch in batches]
    done = threading.Event()

    def run() -> int:
        runs = 0
        while not done.is_set() or not runs:
            for batch, vectors in zip(batches, wanted, strict=True):
                np.testing.assert_array_equal(engine.run(batch), vectors)
                runs += 1
        return runs

    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run) for _ in range(2)]
        try:
            warm(engine, Ladder(others), workers=8)
        finally:
            done.set()
        assert min(one.result() for one in runs) > len(batches)
