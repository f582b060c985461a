"""sentence-transformers on torch, ONNX or OpenVINO, for worker.py. Run as a program, it saves a model for a backend."""

import sys

PACKAGES = (
    "sentence-transformers",
    "transformers",
    "torch",
    "optimum-onnx",
    "optimum-intel",
    "onnxruntime",
    "openvino",
)

BATCH = 32
"""Texts a batch, sorted by length: the library's own default."""

SETTINGS = {
    "torch": {},
    "onnx": {"model_kwargs": {"provider": "CPUExecutionProvider"}},
    # Left alone, OpenVINO computes in bfloat16 wherever the CPU can.
    "openvino": {"model_kwargs": {"ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}},
}


class SentenceTransformers:
    """`SentenceTransformer.encode`.

    Args:
        model: folder; for ONNX and OpenVINO one that `save` wrote, so that no start has to export.
        backend: "torch", "onnx" or "openvino".
        device: of torch; None lets it choose.
        batch: texts a batch.
        dtype: of torch: "float32" or "bfloat16".
    """

    def __init__(self, model, backend, device, batch=BATCH, dtype="float32"):
        from sentence_transformers import SentenceTransformer

        self._model = SentenceTransformer(model, device=device, backend=backend, **SETTINGS[backend])
        if dtype != "float32":
            self._model.bfloat16()
        self._batch = batch

    def encode(self, texts):
        return self._model.encode(list(texts), batch_size=self._batch, show_progress_bar=False).astype("float32")


def make(**options):
    """See `SentenceTransformers`."""
    return SentenceTransformers(**options)


def save(model, backend, folder):
    """Export a model for a backend."""
    from sentence_transformers import SentenceTransformer

    SentenceTransformer(model, device="cpu", backend=backend, **SETTINGS[backend]).save_pretrained(folder)


if __name__ == "__main__":
    save(*sys.argv[1:])
