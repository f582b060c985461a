"""onnxruntime in float32 on CPU as a plain loop, for worker.py."""

from loop import Loop

PACKAGES = ("onnxruntime", "tokenizers", "numpy")


class OnnxRuntime(Loop):
    """Runs what export.py wrote, with onnxruntime's own settings.

    Args:
        model: folder of the checkpoint.
        onnx: file.
    """

    def __init__(self, model, onnx):
        import onnxruntime

        super().__init__(model)
        self._session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])

    def run(self, batches):
        return [self._session.run(None, {"input_ids": ids, "mask": mask})[0] for ids, mask in batches]


def make(**options):
    """See `OnnxRuntime`."""
    return OnnxRuntime(**options)
