"""How an encoder is called: sentence_bert_config.json, the settings of sentence-transformers' Transformer module.

What would change a vector is either honoured or refused by name; what cannot (devices, kinds of attention) is left
aside. Reads no weights, knows no JAX.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION
from jaxembed.errors import CorruptCheckpointError, UnsupportedModelError
from jaxembed.routes import read_json

__all__ = [
    "calls",
    "changed",
    "check_settings",
    "has_chat_template",
    "options",
    "read_head",
    "read_max_length",
    "read_settings",
]

FILES = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""The file was once named after the architecture."""

HEADS = {"ForMaskedLM": FILL_MASK, "ForSequenceClassification": SEQUENCE_CLASSIFICATION}
"""Ending of a class in config.json's `architectures` -> the task."""

NO_LIMIT = 10**9
"""Tokenizers without a length of their own say 1e30; anything at least this long means "no limit"."""

PLACES = frozenset("cache_dir device_map local_files_only revision subfolder token trust_remote_code".split())
"""Options of transformers' loaders that say where from and where to."""
OF_MODEL = PLACES | {"add_pooling_layer", "attn_implementation", "dtype", "low_cpu_mem_usage", "torch_dtype"}
OF_MODEL |= {"use_safetensors"}
OF_TOKENIZER = PLACES | {"clean_up_tokenization_spaces", "model_max_length", "padding_side", "use_fast"}
OF_CALL = frozenset(("max_length", "pad_to_multiple_of", "padding", "padding_side", "return_tensors"))
CUTS = (("truncation", True), ("truncation", "longest_first"), ("truncation", "only_first"))
"""Options that change no vector, or that are honoured."""


def read_settings(folder: Path) -> dict[str, Any]:
    """sentence_bert_config.json, or the same under one of its older names; {} when there is none."""
    return next((found for name in FILES if (found := read_json(folder / name, optional=True))), {})


def options(settings: Mapping[str, Any], name: str, where: Path) -> dict[str, Any]:
    """Options for transformers' loaders, under their new name (`model_kwargs`) or their old one (`model_args`)."""
    given = settings.get(f"{name}_kwargs")
    if given is None:
        given = settings.get({"processor": "tokenizer"}.get(name, name) + "_args")
    if not isinstance(given, dict | None):
        raise CorruptCheckpointError(f"{where}: {name}_kwargs is {given!r}; it must be an object")
    return given or {}


def changed(config: Mapping[str, Any], settings: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """config.json with what the settings change of it (`config_kwargs`)."""
    return {**config, **{k: v for k, v in options(settings, "config", where).items() if k not in PLACES}}


def check_settings(settings: Mapping[str, Any], where: Path, *, head: str | None, dense: bool) -> None:
    """Refuse settings that ask for something else than plain text through the encoder.

    Args:
        settings: sentence_bert_config.json.
        where: its folder, for messages.
        head: the task that the encoder has a head for.
        dense: whether texts get one vector.

    Raises:
        UnsupportedModelError: names the setting, its value and what is supported.
        CorruptCheckpointError: a setting is no object where it must be one.
    """
    refused = {}
    kinds = settings.get("modality_config")
    if kinds is not None:
        if not isinstance(kinds, dict):
            raise CorruptCheckpointError(f"{where}: modality_config is {kinds!r}; it must be an object")
        if "message" in kinds:
            raise UnsupportedModelError(f"{where}: texts go through a chat template (modality_config has 'message')")
        output = "last_hidden_state" if head is None else "logits"
        plain = [{"method": "forward", "method_output_name": name} for name in (output, [output])]
        if kinds.get("text") not in plain:
            refused["modality_config"] = kinds
    made = settings.get("module_output_name")
    if made not in (None, "scores" if head == SEQUENCE_CLASSIFICATION else "token_embeddings"):
        refused["module_output_name"] = made
    if settings.get("tokenizer_name_or_path") is not None:
        refused["tokenizer_name_or_path"] = settings["tokenizer_name_or_path"]
    for name, known in (("model", OF_MODEL), ("processor", OF_TOKENIZER)):
        unknown = {k: v for k, v in options(settings, name, where).items() if k not in known}
        if unknown:
            refused[f"{name}_kwargs"] = unknown
    call = calls(settings, where)
    unknown = {k: v for k, v in call.items() if k not in OF_CALL and (k, v) not in CUTS}
    if unknown:
        refused["processing_kwargs"] = unknown
    if dense:
        # These cut queries and documents to lengths of their own: ColBERT's kind of model has them.
        names = ("query_length", "document_length", "query_expansion")
        refused |= {name: settings[name] for name in names if settings.get(name) is not None}
    if refused:
        listed = "; ".join(f"{name} is {value!r}" for name, value in refused.items())
        raise UnsupportedModelError(f"{where}: sentence_bert_config.json asks for what is not supported: {listed}")


def calls(settings: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Options with which the tokenizer is called (`processing_kwargs`)."""
    given = settings.get("processing_kwargs") or {}
    try:
        return {**(given.get("text") or {}), **(given.get("common") or {})}
    except (AttributeError, TypeError):
        raise CorruptCheckpointError(f"{where}: processing_kwargs is {given!r}; it must hold objects") from None


def read_head(kind: str, settings: Mapping[str, Any], config: Mapping[str, Any], *, alone: bool) -> str | None:
    """What the encoder has on top of its hidden states.

    Args:
        kind: the encoder's class in modules.json.
        settings: sentence_bert_config.json, whose `transformer_task` says it from version 5.4 on.
        config: config.json, whose `architectures` says it in a folder of transformers alone.
        alone: whether it is such a folder.

    Raises:
        UnsupportedModelError: a task that is not implemented.
    """
    task = settings.get("transformer_task", FILL_MASK if kind == "MLMTransformer" else None)
    if task == "feature-extraction":
        return None
    if task is not None:
        if task not in HEADS.values():
            raise UnsupportedModelError(
                f"transformer_task is {task!r}; supported: feature-extraction, {', '.join(HEADS.values())}"
            )
        return str(task)
    named = str((config.get("architectures") or [""])[0]) if alone else ""
    return next((head for suffix, head in HEADS.items() if named.endswith(suffix)), None)


def read_max_length(folder: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> int | None:
    """The most tokens an input may have; None for no limit.

    The settings' number if they have one, else the tokenizer's, which is capped by the model's positions, as
    sentence-transformers does.

    Raises:
        CorruptCheckpointError: a number is none.
    """
    tokenizer = read_json(folder / "tokenizer_config.json", optional=True)
    # The last one given wins, as it does there.
    given = [
        settings.get("max_seq_length"),
        options(settings, "processor", folder).get("model_max_length"),
        calls(settings, folder).get("max_length"),
    ]
    chosen = [value for value in given if value is not None][-1:]
    limits = chosen or [
        tokenizer.get("model_max_length", tokenizer.get("max_len")),
        config.get("max_position_embeddings"),
    ]
    try:
        known = [int(limit) for limit in limits if limit is not None and 0 < limit < NO_LIMIT]
    except TypeError:
        raise CorruptCheckpointError(f"{folder}: a length is no number among {limits!r}") from None
    return min(known) if known else None


def has_chat_template(folder: Path) -> bool:
    """Whether a tokenizer brings along a template for conversations."""
    files = ("chat_template.jinja", "chat_template.json")
    config = read_json(folder / "tokenizer_config.json", optional=True)
    return bool(config.get("chat_template")) or any((folder / name).is_file() for name in files)
