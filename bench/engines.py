"""The engines that are measured, each behind the same two lines: a name, and texts -> vectors.

Every peer is imported only when it is made, so that one which is not installed is a line in the result and no crash.
"""

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from jaxembed.checkpoint import Checkpoint, resolve
from jaxembed.types import PoolingMode

__all__ = ["ENGINES", "OURS", "REFERENCE", "Engine", "Jaxembed", "SentenceTransformers", "make", "min_cosine"]

Vectors = npt.NDArray[np.float32]
BATCH = 32
"""Texts a batch of the peers, sorted by length: sentence-transformers' own default."""


class Engine(Protocol):
    """What is measured."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One vector a text, in order; tokenising is part of it."""
        ...


class Jaxembed:
    """Ours, with its default ladder, every shape compiled.

    Args:
        model: folder or hub id.
        dtype: "float32" or "bfloat16".
    """

    def __init__(self, model: str, dtype: str) -> None:
        from jaxembed import Embedder
        from jaxembed.warmup import cache_folder, use_cache, warm

        # Executables of an earlier run are taken as a server takes them: this shortens the start, nothing else.
        use_cache(cache_folder())
        self._embedder = Embedder.from_pretrained(model, dtype=dtype)
        warm(self._embedder.engine)

    def encode(self, texts: Sequence[str]) -> Vectors:
        return self._embedder.encode(texts)


class SentenceTransformers:
    """sentence-transformers on torch in float32, on the kind of device that JAX uses."""

    def __init__(self, model: str) -> None:
        import jax
        from sentence_transformers import SentenceTransformer

        device = "cpu" if jax.default_backend() == "cpu" else None
        self._model = SentenceTransformer(str(resolve(model)), device=device)

    def encode(self, texts: Sequence[str]) -> Vectors:
        return np.asarray(self._model.encode(list(texts), batch_size=BATCH, show_progress_bar=False))


class OnnxRuntime:
    """onnxruntime on CPU in float32: batches sorted by length; pooling and norm in numpy.

    Raises:
        ValueError: the model is no BERT with mean pooling, which is all that this loop does.
    """

    def __init__(self, model: str) -> None:
        import onnxruntime
        from transformers import AutoTokenizer

        checkpoint = Checkpoint.open(model)
        if checkpoint.config.get("model_type") != "bert" or checkpoint.pooling.modes != (PoolingMode.MEAN,):
            raise ValueError("this loop does BERT with mean pooling only")
        self._normalize = checkpoint.normalize
        self._tokenizer = AutoTokenizer.from_pretrained(str(checkpoint.folder), local_files_only=True).backend_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(checkpoint.max_length)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            export(checkpoint.folder, file)
            self._session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def encode(self, texts: Sequence[str]) -> Vectors:
        rows = [one.ids for one in self._tokenizer.encode_batch_fast(list(texts))]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        parts = [self._run([rows[i] for i in order[k : k + BATCH]]) for k in range(0, len(order), BATCH)]
        result = np.empty((len(rows), parts[0].shape[1]), np.float32)
        result[order] = np.concatenate(parts)
        return result

    def _run(self, rows: Sequence[Sequence[int]]) -> Vectors:
        shape = (len(rows), len(rows[0]))
        ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1.0
        hidden = self._session.run(None, {"input_ids": ids, "mask": mask})[0]
        mean = np.einsum("btd,bt->bd", hidden, mask) / mask.sum(axis=1, keepdims=True)
        return mean / np.linalg.norm(mean, axis=1, keepdims=True) if self._normalize else mean


def export(folder: Path, file: Path) -> None:
    """Write a BERT checkpoint as ONNX: (input_ids int64 [B, T], mask float32 [B, T]) -> hidden float32 [B, T, D]."""
    import torch
    from transformers import BertModel

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True)

        def forward(self, input_ids: Any, mask: Any) -> Any:
            # Already added to the scores' shape: transformers takes a mask of four axes as it is, so that the trace
            # holds no guess of its own about padding.
            added = (1.0 - mask)[:, None, None, :] * torch.finfo(torch.float32).min
            types = torch.zeros_like(input_ids)
            return self.bert(input_ids, attention_mask=added, token_type_ids=types).last_hidden_state

    ids = torch.ones((2, 8), dtype=torch.int64)
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        # The exporter warns of itself and of branches that it traced one way.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Encoder().eval(),
            (ids, torch.ones(ids.shape)),
            str(file),
            input_names=["input_ids", "mask"],
            output_names=["hidden"],
            dynamic_axes={"input_ids": axes, "mask": axes, "hidden": axes},
            opset_version=17,
            dynamo=False,
        )


REFERENCE = "sentence-transformers fp32"
OURS = ("jaxembed fp32", "jaxembed bf16")

ENGINES: Mapping[str, Callable[[str], Engine]] = {
    OURS[0]: partial(Jaxembed, dtype="float32"),
    OURS[1]: partial(Jaxembed, dtype="bfloat16"),
    REFERENCE: SentenceTransformers,
    "onnxruntime fp32": OnnxRuntime,
}
"""Name in the tables -> how to make it. The last ones are the peers."""


def make(name: str, model: str) -> Engine | str:
    """An engine ready to run, or why there is none; ours must work, so its errors are raised."""
    try:
        return ENGINES[name](model)
    except ModuleNotFoundError as error:
        if name in OURS:
            raise
        return f"absent: {error.name} is not installed"
    except Exception as error:  # Whatever keeps a peer from running is for the table to say.
        if name in OURS:
            raise
        return f"absent: {type(error).__name__}: {(str(error) or '?').splitlines()[0]}"


def min_cosine(a: Vectors, b: Vectors) -> float:
    """The least cosine between rows of the same index, in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(((x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))).min())
