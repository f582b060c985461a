"""`python -m fake_server FLAGS`: the server's command line around an engine that does what its input says.

Each letter is a token: a is 3, b is 4 and so on, between the special ids 1 and 2. A vector is what `fakes.vector` says,
of 4 numbers. A text that begins with
- x fails its batch, which says so;
- w waits until the file of FAKE_GATE exists, and leaves FAKE_GATE.waiting meanwhile.
With FAKE_LOADING the model is loaded when that file exists.
"""

import os
import string
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from fakes import FakeEngine, loaded
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing

from jaxembed.buckets import Ladder
from jaxembed.tokenizer import Tokenizer as OurTokenizer
from jaxembed.types import Batch, Bucket
from jaxembed_server import cli
from jaxembed_server.config import ServerConfig
from jaxembed_server.model import Loaded, Progress

LETTERS = {letter: number for number, letter in enumerate(["?", "[", "]", *string.ascii_lowercase])}
MAX_LENGTH = 64


class Obedient(FakeEngine):
    """Runs one row at a time, so that what one row says concerns no other."""

    def run(self, batch: Batch) -> npt.NDArray[np.float32]:
        for ids in batch.input_ids[: batch.rows]:
            if ids[1] == LETTERS["x"]:
                raise ValueError("the text begins with x")
            if ids[1] == LETTERS["w"]:
                wait_for(os.environ["FAKE_GATE"])
        return super().run(batch)


def wait_for(path: str) -> None:
    Path(path + ".waiting").touch()
    while not Path(path).exists():
        time.sleep(0.01)


def letters() -> OurTokenizer:
    """A tokenizer that another process can be told."""
    backend = Tokenizer(WordLevel(LETTERS, unk_token="?"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.post_processor = TemplateProcessing(single="[ $A ]", special_tokens=[("[", 1), ("]", 2)])
    return OurTokenizer(backend, special_ids=frozenset({1, 2}), vocab_size=len(LETTERS), max_length=MAX_LENGTH)


def load(config: ServerConfig, progress: Progress) -> Loaded:
    progress(1, 2)
    if "FAKE_LOADING" in os.environ:
        wait_for(os.environ["FAKE_LOADING"])
    progress(2, 2)
    return replace(loaded(Obedient(Ladder([Bucket(1, MAX_LENGTH)]))), tokenizer=letters())


if __name__ == "__main__":
    assert "jax" not in sys.modules
    sys.exit(cli.main(["serve", *sys.argv[1:]], load))
