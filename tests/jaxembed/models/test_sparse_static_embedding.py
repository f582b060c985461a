"""Static weights for sparse rows against sentence-transformers' own module; test_sparse.py above has the rest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from folders import TEXTS, load
from parity import TOLERANCE, small_tokenizer
from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding


def test_parity(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Each token's own weight, once."""
    weight = torch.randn(62, generator=torch.Generator().manual_seed(0)).abs()
    theirs = SparseEncoder(
        modules=[SparseStaticEmbedding(small_tokenizer(model_max_length=100), weight=weight)], device="cpu"
    )
    theirs.save(str(tmp_path), create_model_card=False)
    got = load(tmp_path, length=128).encode_sparse(TEXTS).toarray()
    worst = float(np.abs(got - theirs.encode(TEXTS).to_dense().numpy()).max())
    assert worst <= TOLERANCE
    record_property("reference", "SparseStaticEmbedding of sentence-transformers")
    record_property("max abs diff", f"{worst:.1e}")
