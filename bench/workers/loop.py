"""What the plain loops share: texts -> batches of 32 sorted by length -> vectors in the order of the texts."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

BATCH = 32


class Loop:
    """Tokenises and sorts; a subclass runs the batches.

    Args:
        model: folder of the checkpoint, for its tokenizer.
    """

    def __init__(self, model):
        folder = Path(model)
        settings = json.loads((folder / "sentence_bert_config.json").read_text())
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(settings["max_seq_length"])

    def encode(self, texts):
        rows = [one.ids for one in self._tokenizer.encode_batch_fast(list(texts))]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
        places = [order[k : k + BATCH] for k in range(0, len(order), BATCH)]
        parts = self.run([padded([rows[i] for i in one]) for one in places])
        result = np.empty((len(rows), parts[0].shape[1]), np.float32)
        for one, part in zip(places, parts):  # noqa: B905 - as long as one another by what `run` promises.
            result[one] = part
        return result

    def run(self, batches):
        """The vectors of each batch, in order."""
        raise NotImplementedError


def padded(rows):
    """(input_ids int64 [B, T], mask float32 [B, T]) of rows, the longest first."""
    shape = (len(rows), len(rows[0]))
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1.0
    return ids, mask
