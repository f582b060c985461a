"""OpenVINO on CPU as a plain loop with asynchronous requests, for worker.py."""

from functools import partial

from loop import Loop

PACKAGES = ("openvino", "tokenizers", "numpy")

STREAMS = 2
"""Batches that run beside one another, each on its share of the cores."""


class OpenVino(Loop):
    """Runs what export.py wrote, of any batch size and length.

    Args:
        model: folder of the checkpoint.
        onnx: file.
        precision: "f32" or "bf16", as a hint: the plugin falls back to f32 where the CPU has no bf16.

    Attributes:
        note: the precision that was used, where it is not the one that was asked for.
    """

    def __init__(self, model, onnx, precision):
        import openvino

        super().__init__(model)
        settings = {"INFERENCE_PRECISION_HINT": precision, "NUM_STREAMS": str(STREAMS)}
        core = openvino.Core()
        compiled = core.compile_model(onnx, "CPU", settings)
        self._queue = openvino.AsyncInferQueue(compiled, STREAMS)
        self._queue.set_callback(lambda request, keep: keep(request.get_output_tensor(0).data.copy()))
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        self.note = "" if used == precision else f"asked for {precision}, the plugin ran {used}"
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            self.note += ": this CPU has no bf16 instructions"

    def run(self, batches):
        parts = [None] * len(batches)
        for place, (ids, mask) in enumerate(batches):
            self._queue.start_async({"input_ids": ids, "mask": mask}, partial(parts.__setitem__, place))
        self._queue.wait_all()
        return parts


def make(**options):
    """See `OpenVino`."""
    return OpenVino(**options)
