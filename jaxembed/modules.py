"""What follows the encoder: each module's config.json -> a frozen description. Reads no weights.

The modules are sentence-transformers'. Those that work on token vectors (WeightedLayerPooling, Dense of
"token_embeddings") stand before Pooling, those that work on one vector a text behind it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxembed.errors import CorruptCheckpointError, UnsupportedModelError
from jaxembed.routes import Entry, last, read_json
from jaxembed.types import Pooling, PoolingMode, SpladePooling

__all__ = [
    "Dense",
    "LayerNorm",
    "Module",
    "Normalize",
    "WeightedLayerPooling",
    "read_modules",
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
