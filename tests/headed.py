"""Tiny random models of transformers with a head, of every architecture that has one here; and a tokenizer for each."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from parity import TINY, randomise, small_tokenizer
from tokenizers import processors
from transformers import PreTrainedModel

__all__ = ["KINDS", "original", "save_with_tokenizer"]

DISTILBERT = {
    "vocab_size": 64,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 40,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}

KINDS: Mapping[str, Mapping[str, Any]] = {
    "Albert": {**TINY, "embedding_size": 12},
    "Bert": TINY,
    "Camembert": {**TINY, **SPECIAL, "type_vocab_size": 1},
    "DebertaV2": TINY,
    "DistilBert": DISTILBERT,
    "Electra": {**TINY, "embedding_size": 12},
    "Ernie": TINY,
    "Gte": {**TINY, **SPECIAL},
    "ModernBert": {**TINY, **SPECIAL},
    "MPNet": {**TINY, "pad_token_id": 1},
    "Roberta": {**TINY, "pad_token_id": 1},
    "XLMRoberta": {**TINY, **SPECIAL, "type_vocab_size": 1},
}
"""The first part of a class name -> options of its configuration."""


def original(kind: str, task: str, **overrides: Any) -> PreTrainedModel:
    """A model of `KINDS` with the head of a task ("SequenceClassification", "MaskedLM"), all its values random."""
    config = getattr(transformers, f"{kind}Config")(**{**KINDS[kind], **overrides})
    return randomise(getattr(transformers, f"{kind}For{task}")(config), 0)


def save_with_tokenizer(model: PreTrainedModel, kind: str, folder: Path) -> Path:
    """Write a model and a tokenizer that treats pairs as those of its kind do; returns the folder."""
    model.save_pretrained(folder)
    typed = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if kind == "Bert" else {}
    # Places count from the padding token's, which is 0 here: one of 32 stays empty.
    tokenizer = small_tokenizer(model_max_length=31 if kind == "XLMRoberta" else 32, **typed)
    if kind == "XLMRoberta":
        tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save_pretrained(folder)
    return folder
