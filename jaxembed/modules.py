"""What follows the encoder: modules.json and each module's config.json -> frozen descriptions. Reads no weights.

The modules are sentence-transformers'. Those that work on token vectors (WeightedLayerPooling, Dense of
"token_embeddings") stand before Pooling, those that work on one vector a text behind it.
"""

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxembed.errors import CorruptCheckpointError, UnsupportedModelError
from jaxembed.types import Pooling, PoolingMode, SpladePooling

__all__ = [
    "Dense",
    "LayerNorm",
    "Module",
    "Normalize",
    "Route",
    "WeightedLayerPooling",
    "read_json",
    "read_modules",
    "read_routes",
]

TOKENS, VECTOR = "token_embeddings", "sentence_embedding"

LEGACY_POOLING = {
    "pooling_mode_cls_token": PoolingMode.CLS,
    "pooling_mode_max_tokens": PoolingMode.MAX,
    "pooling_mode_mean_tokens": PoolingMode.MEAN,
    "pooling_mode_mean_sqrt_len_tokens": PoolingMode.MEAN_SQRT_LEN,
    "pooling_mode_weightedmean_tokens": PoolingMode.WEIGHTED_MEAN,
    "pooling_mode_lasttoken": PoolingMode.LAST_TOKEN,
}

ACTIVATIONS = {
    "GELU": "gelu",
    "Identity": "linear",
    "ReLU": "relu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
}
"""torch's classes -> the names in `layers.ACTIVATIONS`."""


@dataclass(frozen=True)
class Dense:
    """y = activation(x W + b), and with `residual` x (or its projection, where the sizes differ) is added.

    Attributes:
        folder: holds the weights.
        in_features, out_features: sizes.
        bias: whether there is b.
        activation: a name in `layers.ACTIVATIONS`.
        residual: see above.
        tokens: works on each token's vector in place of the text's.
    """

    folder: Path
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "tanh"
    residual: bool = False
    tokens: bool = False


@dataclass(frozen=True)
class LayerNorm:
    """Layer normalisation of the text's vector; eps is torch's default, 1e-5."""

    folder: Path
    dimension: int


@dataclass(frozen=True)
class WeightedLayerPooling:
    """Token vectors become a weighted mean of the layers from `layer_start` on (0 is the embeddings' output)."""

    folder: Path
    layers: int
    layer_start: int


@dataclass(frozen=True)
class Normalize:
    """L2 norm, eps 1e-12, of the text's vector or of each token's."""

    tokens: bool = False


Module = Pooling | SpladePooling | Dense | LayerNorm | WeightedLayerPooling | Normalize


class Entry(NamedTuple):
    """One line of modules.json: the last part of the class path, and the module's folder."""

    kind: str
    folder: Path


class Route(NamedTuple):
    """The modules that inputs of one kind go through, the encoder first.

    Attributes:
        entries: the modules; empty for a folder without modules.json.
        default: whether inputs of no kind go here.
    """

    entries: tuple[Entry, ...]
    default: bool = True


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


def read_routes(root: Path) -> dict[str, Route]:
    """The routes of a folder: one named "" unless a Router stands in modules.json.

    Both namespaces are known by the last part of a class path: `sentence_transformers.models.Pooling` (up to 5)
    and `sentence_transformers.sentence_transformer.modules.pooling.Pooling` (from 6).

    Raises:
        CorruptCheckpointError: a file is malformed.
        UnsupportedModelError: more than one Router, or one that routes by something else than the task.
    """
    path = root / "modules.json"
    if not path.is_file():
        return {"": Route(())}
    try:
        lines = sorted(json.loads(path.read_bytes()), key=lambda entry: int(entry["idx"]))
        entries = [Entry(last(entry["type"]), inside(root, entry["path"])) for entry in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} is no list of modules: {error!r}") from None
    if not entries:
        raise CorruptCheckpointError(f"{path} lists no modules")
    routers = [place for place, entry in enumerate(entries) if entry.kind in ("Router", "Asym")]
    if not routers:
        return {"": Route(tuple(entries))}
    if len(routers) > 1:
        raise UnsupportedModelError(f"{path} has {len(routers)} Router modules; supported: one")
    place = routers[0]
    before, after = entries[:place], entries[place + 1 :]
    inner, default = read_router(entries[place].folder)
    return {name: Route((*before, *middle, *after), default=name == default) for name, middle in inner.items()}


def read_router(folder: Path) -> tuple[dict[str, tuple[Entry, ...]], str | None]:
    """A Router's routes, and which of them inputs of no task take (None: they are refused).

    Raises:
        CorruptCheckpointError: its file is malformed.
        UnsupportedModelError: it routes images or the like.
    """
    path = folder / "router_config.json"
    given = read_json(path if path.is_file() else folder / "config.json")
    try:
        types = {name: last(kind) for name, kind in given["types"].items()}
        routes = {
            str(route): tuple(Entry(types[name], inside(folder, name)) for name in names)
            for route, names in given["structure"].items()
        }
        parameters = dict(given.get("parameters") or {})
        mappings = {ast.literal_eval(key): route for key, route in (parameters.get("route_mappings") or {}).items()}
        # Several tasks may share a route.
        for (task, modality), route in mappings.items():
            if modality not in (None, "text") or task is None:
                raise UnsupportedModelError(f"{path} routes by modality {modality!r}; supported: by task, of texts")
            routes[task] = routes[route]
    except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        raise CorruptCheckpointError(f"{path} is no Router configuration: {error!r}") from None
    default = parameters.get("default_route")
    if default is None and parameters.get("allow_empty_key", True):
        default = next(iter(routes))
    return routes, default


def last(kind: Any) -> str:
    """The last part of a class path."""
    return str(kind).rsplit(".", 1)[-1]


def inside(root: Path, name: Any) -> Path:
    """A folder that another file names; it must stay inside.

    Raises:
        ValueError: it does not.
    """
    folder = root / str(name)
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leads out of the folder")
    return folder


def read_modules(entries: Sequence[Entry], *, pooled: bool = False) -> tuple[Module, ...]:
    """Describe the modules behind the encoder, those left out that do nothing outside training.

    Args:
        entries: the modules, in order.
        pooled: whether texts have one vector already.

    Raises:
        CorruptCheckpointError: a module's file is malformed.
        UnsupportedModelError: a module, an option of one, or an order of them that is not implemented.
    """
    modules: list[Module] = []
    for entry in entries:
        module = read_module(entry)
        if module is None:
            continue
        pools = isinstance(module, Pooling | SpladePooling)
        of_tokens = pools or isinstance(module, WeightedLayerPooling) or getattr(module, "tokens", False)
        if of_tokens is pooled:
            place = "behind" if pooled else "before"
            raise UnsupportedModelError(f"the module {entry.kind!r} in {entry.folder} cannot stand {place} Pooling")
        pooled = pooled or pools
        modules.append(module)
    return tuple(modules)


def read_module(entry: Entry) -> Module | None:
    """Describe one module; None for one that does nothing outside training. The errors are those of `read_modules`."""
    reader = READERS.get(entry.kind)
    if reader is None:
        raise UnsupportedModelError(
            f"the module {entry.kind!r} in {entry.folder} is not supported; supported: {', '.join(sorted(READERS))}"
        )
    config = read_json(entry.folder / "config.json", optional=entry.kind in WITHOUT_FILE)
    try:
        return reader(config, entry.folder)
    except KeyError as error:
        raise CorruptCheckpointError(f"{entry.folder / 'config.json'} lacks {error}") from None


def read_pooling(config: Mapping[str, Any], folder: Path) -> Pooling:
    """The old booleans (none true: mean) or the new `pooling_mode`."""
    given = config.get("pooling_mode")
    if given is None:
        modes = tuple(mode for key, mode in LEGACY_POOLING.items() if config.get(key))
    else:
        try:
            modes = tuple(PoolingMode(mode) for mode in ([given] if isinstance(given, str) else given))
        except ValueError:
            raise UnsupportedModelError(f"pooling_mode is {given!r}; supported: {', '.join(PoolingMode)}") from None
    return Pooling(modes or (PoolingMode.MEAN,), bool(config.get("include_prompt", True)))


def read_dense(config: Mapping[str, Any], folder: Path) -> Dense:
    """sentence-transformers' Dense; the activation is Tanh where none is named."""
    source = config.get("module_input_name") or VECTOR
    target = config.get("module_output_name") or source
    if source != target or source not in (TOKENS, VECTOR):
        raise UnsupportedModelError(
            f"{folder}: Dense reads {source!r} and writes {target!r}; supported: both {TOKENS!r} or both {VECTOR!r}"
        )
    return Dense(
        folder=folder,
        in_features=int(config["in_features"]),
        out_features=int(config["out_features"]),
        bias=bool(config.get("bias", True)),
        activation=read_activation(config.get("activation_function", "torch.nn.modules.activation.Tanh"), folder),
        residual=bool(config.get("use_residual", False)),
        tokens=source == TOKENS,
    )


def read_activation(given: Any, folder: Path) -> str:
    """Our name of a torch class path."""
    name = ACTIVATIONS.get(last(given))
    if name is None or not str(given).startswith("torch."):
        raise UnsupportedModelError(
            f"{folder}: the activation is {given!r}; supported: torch's {', '.join(sorted(ACTIVATIONS))}"
        )
    return name


def read_layer_norm(config: Mapping[str, Any], folder: Path) -> LayerNorm:
    """sentence-transformers' LayerNorm."""
    return LayerNorm(folder, int(config["dimension"]))


def read_layers(config: Mapping[str, Any], folder: Path) -> WeightedLayerPooling:
    """sentence-transformers' WeightedLayerPooling, with its defaults."""
    return WeightedLayerPooling(folder, int(config.get("num_hidden_layers", 12)), int(config.get("layer_start", 4)))


def read_normalize(config: Mapping[str, Any], folder: Path) -> Normalize:
    """sentence-transformers' Normalize."""
    source = config.get("module_input_name") or VECTOR
    if source not in (TOKENS, VECTOR) or (config.get("module_output_name") or source) != source:
        raise UnsupportedModelError(f"{folder}: Normalize of {source!r}; supported: {TOKENS!r}, {VECTOR!r}")
    return Normalize(tokens=source == TOKENS)


def read_splade(config: Mapping[str, Any], folder: Path) -> SpladePooling:
    """sentence-transformers' SpladePooling."""
    strategy, activation = config.get("pooling_strategy", "max"), config.get("activation_function", "relu")
    if strategy not in ("max", "sum") or activation not in ("relu", "log1p_relu"):
        raise UnsupportedModelError(
            f"{folder}: SpladePooling by {strategy!r} of {activation!r}; supported: max and sum, of relu and log1p_relu"
        )
    return SpladePooling(strategy, activation == "log1p_relu")


def read_nothing(config: Mapping[str, Any], folder: Path) -> None:
    """Dropout and the like."""
    return None


WITHOUT_FILE = ("Dropout", "Normalize")
"""Up to version 5 these have no config.json."""

READERS: Mapping[str, Callable[[Mapping[str, Any], Path], Module | None]] = {
    "Dense": read_dense,
    "Dropout": read_nothing,
    "LayerNorm": read_layer_norm,
    "Normalize": read_normalize,
    "Pooling": read_pooling,
    "SpladePooling": read_splade,
    "WeightedLayerPooling": read_layers,
}
