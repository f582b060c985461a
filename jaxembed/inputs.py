"""What is asked of a model: texts or token ids, with which prompt, for which task. Knows no JAX and runs nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxembed.checkpoint import Checkpoint
from jaxembed.errors import InputTypeError, PromptNameError, TaskNameError
from jaxembed.tokenizer import TokenIds
from jaxembed.types import NO_TASK

__all__ = ["DOCUMENT", "QUERY", "SIDES", "Inputs", "choose_prompt", "listed", "task_number"]

Inputs = str | Sequence[str] | TokenIds | Sequence[TokenIds]

QUERY = ("query", "retrieval.query")
DOCUMENT = ("document", "passage", "corpus", "retrieval.passage")
"""Names under which models keep the prompts and tasks of the two sides of a search."""
SIDES = {"query": QUERY, "document": DOCUMENT}


def choose_prompt(checkpoint: Checkpoint, prompt: str | None, prompt_name: str | None) -> str:
    """The text to put before an input: `prompt`, else the prompt named, else the default one, else "".

    Raises:
        PromptNameError: the model has no prompt of this name.
    """
    if prompt is not None:
        return prompt
    name = prompt_name if prompt_name is not None else checkpoint.default_prompt_name
    if name is None:
        return ""
    if name not in checkpoint.prompts:
        raise PromptNameError(name, sorted(checkpoint.prompts))
    return checkpoint.prompts[name]


def task_number(tasks: Sequence[str], task: str | None, prompt_name: str | None) -> int:
    """The number of the task asked for: `task`, else the one of the prompt's name, else `NO_TASK`.

    Raises:
        TaskNameError: the model has no task of this name.
    """
    if task is not None:
        if task not in tasks:
            raise TaskNameError(task, sorted(tasks))
        return tasks.index(task)
    return tasks.index(prompt_name) if prompt_name in tasks else NO_TASK


def listed(inputs: Inputs) -> tuple[Sequence[Any], bool]:
    """The inputs as a list of strings or of token-id sequences, and whether it was a single one.

    Raises:
        InputTypeError: neither strings nor token ids, or a mixture.
    """
    if isinstance(inputs, str):
        return [inputs], True
    if isinstance(inputs, np.ndarray):
        return ([inputs], True) if inputs.ndim == 1 and inputs.dtype.kind in "iu" else (list(inputs), False)
    if not isinstance(inputs, Sequence) or isinstance(inputs, (bytes, bytearray)):
        raise InputTypeError(f"the input must be a string, a list of strings or token ids, not {type(inputs).__name__}")
    if inputs and all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in inputs):
        return [inputs], True
    texts = isinstance(inputs[0], str) if inputs else True
    for index, item in enumerate(inputs):
        if isinstance(item, str) is not texts or not isinstance(item, (str, Sequence, np.ndarray)):
            wanted = "a string" if texts else "a list of token ids"
            raise InputTypeError(f"input[{index}] must be {wanted}, not {type(item).__name__}", index=index)
    return inputs, False
