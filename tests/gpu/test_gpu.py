"""What only a GPU computes: cuDNN's attention in real executables. `make test-gpu` runs it, `make test` does not."""

from pathlib import Path

import numpy as np
import pytest
from parity import cosines

from jaxembed import Bucket, Embedder, Ladder
from jaxembed.attention import FUSED_LENGTH
from jaxembed.buckets import Row, pack
from jaxembed.types import Encoding

KERNEL = "__cudnn$fmha"
"""How XLA's program calls cuDNN's attention."""


@pytest.mark.parametrize("length", [FUSED_LENGTH, 100, 167, 256])
def test_minilm_with_fused_attention(minilm_folder: Path, length: int) -> None:
    """Rows of all lengths, and one of padding: as in float32, within what bfloat16 gives; no NaN."""
    bucket = Bucket(16, length)
    random = np.random.default_rng(length)
    lengths = [length, 1, 2, *random.integers(3, length, 12)]
    rows = [
        Row(Encoding(random.integers(1000, 30_000, count, np.int32)), 384, True, i) for i, count in enumerate(lengths)
    ]
    got = {}
    for dtype in ("float32", "bfloat16"):
        embedder = Embedder.from_pretrained(minilm_folder, dtype=dtype, ladder=Ladder([bucket]))
        engine = embedder.engine
        assert engine.platform == "gpu"
        engine.compile(bucket)
        got[dtype] = engine.run(pack(bucket, rows))
        program = engine._executables[bucket].as_text()
        assert (KERNEL in program) == (dtype == "bfloat16")
    assert np.isfinite(got["bfloat16"]).all()
    assert cosines(got["bfloat16"], got["float32"]).min() >= 0.9998
