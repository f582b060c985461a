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
    "Routes",
    "WeightedLayerPooling",
    "read_json",
    "read_modules",
    "read_routes",
]

TOKENS, VECTOR = "token_embeddings", "sentence_embedding"

ROUTERS = ("Asym", "Router")
SIDES = ("query", "document")
"""The tasks that sentence-transformers' own methods name."""
OTHERS = frozenset(("image", "audio", "video", "message"))
"""Routes of these names are for inputs that are no texts."""

FOREIGN = {"custom_st.Transformer": "Transformer", "pylate.models.Dense.Dense": "Dense"}
"""Classes that are not sentence-transformers' own -> what they are: jina-embeddings-v3's, in a file of the checkpoint,
which hands the task to its encoder; PyLate's, which works on tokens."""

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
        beside: the folder is the encoder's, among whose weights its own stand.
    """

    folder: Path
    in_features: int
    out_features: int
    bias: bool = True
    activation: str = "tanh"
    residual: bool = False
    tokens: bool = False
    beside: bool = False


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
    """One line of modules.json: what `kind_of` makes of the class path, and the module's folder."""

    kind: str
    folder: Path


Entries = tuple[Entry, ...]
"""The modules that a text goes through, the encoder first; empty for a folder without modules.json."""


class Routes(NamedTuple):
    """Where texts of each task go.

    Attributes:
        of: task -> modules; {"": modules} where there is no Router.
        default: the task of texts that name none; None where they are refused.
    """

    of: Mapping[str, Entries]
    default: str | None


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


def read_routes(root: Path) -> Routes:
    """The routes of a folder: one named "" unless a Router stands in modules.json.

    The modules are run in the order of the list, whatever its `idx` say, as sentence-transformers does.

    Raises:
        CorruptCheckpointError: a file is malformed.
        UnsupportedModelError: more than one Router, or one that no text can go through.
    """
    path = root / "modules.json"
    if not path.is_file():
        return Routes({"": ()}, "")
    try:
        lines = json.loads(path.read_bytes())
        entries = tuple(Entry(kind_of(line["type"]), inside(root, line["path"])) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} is no list of modules: {error!r}") from None
    if not entries:
        raise CorruptCheckpointError(f"{path} lists no modules")
    routers = [place for place, entry in enumerate(entries) if entry.kind in ROUTERS]
    if not routers:
        return Routes({"": entries}, "")
    if len(routers) > 1:
        raise UnsupportedModelError(f"{path} has {len(routers)} Router modules; supported: one")
    place = routers[0]
    before, after = entries[:place], entries[place + 1 :]
    inner, default = read_router(entries[place].folder)
    return Routes({task: (*before, *middle, *after) for task, middle in inner.items()}, default)


def read_router(folder: Path) -> Routes:
    """A Router's own routes, those that texts can go through.

    Raises:
        CorruptCheckpointError: its file is malformed.
        UnsupportedModelError: it routes images or the like alone.
    """
    path = folder / "router_config.json"
    # Up to version 4 the class was called Asym, and the file so.
    path = path if path.is_file() else folder / "config.json"
    given = read_json(path)
    try:
        kinds = {name: kind_of(kind) for name, kind in given["types"].items()}
        routes = {
            str(route): tuple(Entry(kinds[name], inside(folder, name)) for name in names)
            for route, names in given["structure"].items()
        }
        parameters = dict(given.get("parameters") or {})
        mappings = {ast.literal_eval(key): route for key, route in (parameters.get("route_mappings") or {}).items()}
        for_text = {str(task) for task, kind in mappings if task is not None and kind in (None, "text")}
        for_others = OTHERS | {mappings[task, kind] for task, kind in mappings if kind not in (None, "text")}
        named = parameters.get("default_route")
        if not routes or not {*mappings.values(), *([] if named is None else [named])} <= routes.keys():
            raise ValueError("it names a route that it does not have")
    except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
        raise CorruptCheckpointError(f"{path} is no Router configuration: {error!r}") from None
    if named is None and parameters.get("allow_empty_key", True):
        named = next(iter(routes))
    tasks = (*(route for route in routes if route not in for_others), *sorted(for_text), *SIDES)
    ways = {task: way(task, routes, mappings) for task in dict.fromkeys(tasks)}
    found = {task: route for task, route in ways.items() if route is not None}
    default = way(None, routes, mappings) or named
    if default is not None and found.setdefault(default, default) != default:
        raise UnsupportedModelError(f"{path}: texts of no task take the route {default!r}, which no task leads to")
    if not found:
        raise UnsupportedModelError(f"{path} has no route for texts, only {', '.join(routes)}")
    return Routes({task: routes[route] for task, route in found.items()}, default)


def way(task: str | None, routes: Mapping[str, Any], mappings: Mapping[Any, str]) -> str | None:
    """The route that sentence-transformers' Router gives texts of a task; None where it has none for it."""
    for key in ((task, "text"), (task, None), (None, "text"), (None, None)):
        if key in mappings:
            return mappings[key]
    return next((name for name in (task, "text") if name in routes), None)


def kind_of(path: Any) -> str:
    """What a module is: the class's name for sentence-transformers' own, else the whole class path.

    Their namespace changed: `sentence_transformers.models.Pooling` up to version 5, and
    `sentence_transformers.sentence_transformer.modules.pooling.Pooling` from 6. Somebody else's Pooling may compute
    something else.
    """
    path = str(path)
    return last(path) if path.startswith("sentence_transformers.") else FOREIGN.get(path, path)


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


def read_modules(entries: Sequence[Entry], *, pooled: bool = False, late: bool = False) -> tuple[Module, ...]:
    """Describe the modules behind the encoder, those left out that compute nothing.

    Args:
        entries: the modules, in order.
        pooled: whether texts have one vector already.
        late: whether the model is one of late interaction, whose Dense works on tokens where it does not say.

    Raises:
        CorruptCheckpointError: a module's file is malformed.
        UnsupportedModelError: a module, an option of one, or an order of them that is not implemented.
    """
    modules: list[Module] = []
    for entry in entries:
        module = read_module(entry, late=late)
        if module is None:
            continue
        pools = isinstance(module, Pooling | SpladePooling)
        of_tokens = pools or isinstance(module, WeightedLayerPooling) or getattr(module, "tokens", False)
        if of_tokens is pooled:
            place = "behind" if pooled else "before"
            raise UnsupportedModelError(f"the module {entry.kind!r} in {entry.folder} cannot stand {place} Pooling")
        if isinstance(module, WeightedLayerPooling) and modules:
            # It reads the encoder's layers, not what a module before it made of them.
            raise UnsupportedModelError(f"the module {entry.kind!r} in {entry.folder} must be the first one")
        pooled = pooled or pools
        modules.append(module)
    return tuple(modules)


def read_module(entry: Entry, *, late: bool = False) -> Module | None:
    """Describe one module; None for one that computes nothing. `late` and the errors are those of `read_modules`."""
    reader = READERS.get(entry.kind)
    if reader is None:
        raise UnsupportedModelError(
            f"the module {entry.kind!r} in {entry.folder} is not supported; supported: {', '.join(sorted(READERS))}"
        )
    config = read_json(entry.folder / "config.json", optional=entry.kind in WITHOUT_FILE)
    if late and entry.kind == "Dense":
        config = {"module_input_name": TOKENS, **config}
    try:
        return reader(config, entry.folder)
    except KeyError as error:
        raise CorruptCheckpointError(f"{entry.folder / 'config.json'} lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{entry.folder / 'config.json'} is malformed: {error}") from None


def read_pooling(config: Mapping[str, Any], folder: Path) -> Pooling:
    """The old booleans (none true: mean) or the new `pooling_mode`."""
    unknown = sorted(key for key in config if key.startswith("pooling_mode_") and key not in LEGACY_POOLING)
    if any(config[key] for key in unknown):
        raise UnsupportedModelError(
            f"{folder}: pooling by {', '.join(unknown)}; supported: {', '.join(LEGACY_POOLING)}"
        )
    given = config.get("pooling_mode")
    if given is None:
        modes = tuple(mode for key, mode in LEGACY_POOLING.items() if config.get(key)) or (PoolingMode.MEAN,)
    else:
        try:
            modes = tuple(PoolingMode(mode) for mode in ([given] if isinstance(given, str) else given))
        except ValueError:
            modes = ()
        if not modes:
            raise UnsupportedModelError(f"pooling_mode is {given!r}; supported: {', '.join(PoolingMode)}")
    return Pooling(modes, bool(config.get("include_prompt", True)))


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
    """Dropout, which only training has; MultiVectorMask, which `colbert` reads."""
    return None


WITHOUT_FILE = ("Dropout", "Normalize")
"""Up to version 5 these have no config.json."""

READERS: Mapping[str, Callable[[Mapping[str, Any], Path], Module | None]] = {
    "Dense": read_dense,
    "Dropout": read_nothing,
    "LayerNorm": read_layer_norm,
    "MultiVectorMask": read_nothing,
    "Normalize": read_normalize,
    "Pooling": read_pooling,
    "SpladePooling": read_splade,
    "WeightedLayerPooling": read_layers,
}
