"""Whole folders: written by sentence-transformers, or by hand as its older versions did, and compared with it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from parity import cosines, save_checkpoint, tiny_bert
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from jaxembed import Bucket, Embedder, Ladder, make_mesh

__all__ = ["MIN_COSINE", "TEXTS", "compare", "load", "old_modules", "reload", "save", "tiny_transformer", "write"]

MIN_COSINE = 0.999999
TEXTS = [
    "a b c",
    "",
    "hello world",
    "   white \t space\n kept ",
    "[SEP] written out",
    "x y z " * 20,
    "0 1 2 3 4 5 6",
    "one",
]


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """Files under a folder: bytes as they are, anything else as JSON; returns the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def old_modules(*kinds: str) -> list[dict[str, Any]]:
    """modules.json as versions 2 to 5 wrote it: the first module in the root, the others numbered."""
    return [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]


def tiny_transformer(folder: Path, seed: int = 0, **overrides: Any) -> Transformer:
    """sentence-transformers' module of a random BERT, which is written into the folder; width 16, two layers."""
    return Transformer(str(save_checkpoint(tiny_bert(seed, **overrides), folder)))


def save(folder: Path, chain: Sequence[Any], **options: Any) -> Path:
    """Have sentence-transformers write a chain of its modules; returns the folder.

    Args:
        folder: where to.
        chain: the modules.
        options: for SentenceTransformer: prompts, truncate_dim.
    """
    SentenceTransformer(modules=list(chain), device="cpu", **options).save(str(folder), create_model_card=False)
    return folder


def reload(folder: Path) -> SentenceTransformer:
    """sentence-transformers' own reading of a folder: what its files say, not what was in memory; in float32."""
    # Without being told so it would compute in the dtype of the encoder's file, and bring all modules to that.
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}).float()


def load(folder: Path, *, length: int = 32, **options: Any) -> Embedder:
    """Ours, on one device and with a single bucket, a flat one."""
    ladder = Ladder([Bucket(8, length, 4 * length)])
    return Embedder.from_pretrained(folder, ladder=ladder, mesh=make_mesh(jax.devices()[:1]), **options)


def compare(
    ours: Embedder, theirs: SentenceTransformer, texts: Sequence[str] = TEXTS, *, method: str = "encode", **options: Any
) -> float:
    """The least cosine, after checking it and the lengths of the vectors; vectors of zeros must be so in both."""
    got, want = getattr(ours, method)(list(texts), **options), getattr(theirs, method)(list(texts), **options)
    assert got.shape == want.shape
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), np.linalg.norm(want, axis=1), rtol=1e-5)
    some = want.any(axis=1)
    assert some.any()
    least = float(cosines(got[some], want[some]).min())
    assert least >= MIN_COSINE
    return least
