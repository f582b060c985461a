"""A BERT checkpoint as ONNX, pooling and norm included: `python export.py MODEL FILE`. Needs torch and transformers.

(input_ids int64 [B, T], mask float32 [B, T]) -> float32 [B, D]
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from transformers import BertModel


class Encoder(torch.nn.Module):
    """BERT, the mean over the real tokens, the L2 norm.

    Raises:
        ValueError: the model is anything else.
    """

    def __init__(self, folder):
        super().__init__()
        config = json.loads((folder / "config.json").read_text())
        modules = json.loads((folder / "modules.json").read_text())
        pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
        modes = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
        kinds = [module["type"].rsplit(".", 1)[1] for module in modules]
        if (
            config.get("model_type") != "bert"
            or modes != ["pooling_mode_mean_tokens"]
            or kinds != ["Transformer", "Pooling", "Normalize"]
        ):
            raise ValueError("the plain loops do BERT with mean pooling and a norm only")
        self.bert = BertModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True)

    def forward(self, input_ids, mask):
        # Already added to the scores' shape: transformers takes a mask of four axes as it is, so that the trace holds
        # no guess of its own about padding.
        added = (1.0 - mask)[:, None, None, :] * torch.finfo(torch.float32).min
        types = torch.zeros_like(input_ids)
        hidden = self.bert(input_ids, attention_mask=added, token_type_ids=types).last_hidden_state
        mean = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return mean / mean.norm(dim=1, keepdim=True)


def main(model, file):
    """Write the file."""
    ids = torch.ones((2, 8), dtype=torch.int64)
    axes = {0: "batch", 1: "length"}
    with warnings.catch_warnings():
        # The exporter warns of itself and of branches that it traced one way.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Encoder(Path(model)).eval(),
            (ids, torch.ones(ids.shape)),
            file,
            input_names=["input_ids", "mask"],
            output_names=["vectors"],
            dynamic_axes={"input_ids": axes, "mask": axes, "vectors": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
