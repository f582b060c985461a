"""Static embeddings against sentence-transformers' own module; test_static_embedding.py above has the rest."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from folders import TEXTS, load, reload, save
from parity import TOLERANCE, randomise, small_tokenizer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding


def test_parity(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """The mean of the tokens' vectors; zeros for an empty text."""
    save(tmp_path, [randomise(StaticEmbedding(small_tokenizer().backend_tokenizer, embedding_dim=24), 7)])
    worst = float(np.abs(load(tmp_path, length=128).encode(TEXTS) - reload(tmp_path).encode(TEXTS)).max())
    assert worst <= TOLERANCE
    record_property("reference", "StaticEmbedding of sentence-transformers")
    record_property("max abs diff", f"{worst:.1e}")
