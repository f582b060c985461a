"""Registry + checkpoint + mesh -> a Model with its weights on the devices.

Loading walks the *model*: every parameter is looked up in the checkpoint, and every checkpoint key that is left over
must be one that the architecture ignores. Nothing is ever filled in at random; one error lists all that is wrong.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxembed.checkpoint import Checkpoint
from jaxembed.errors import UnsupportedModelError, WeightsError
from jaxembed.models import architecture
from jaxembed.pooling import finish, pool
from jaxembed.sharding import make_mesh, parameter_sharding
from jaxembed.tensors import Tensors
from jaxembed.types import Architecture, Layout, Weight

__all__ = ["DTYPES", "Model", "load"]

DTYPES = ("float32", "bfloat16")
"""What the matrices may be held in. Norms, biases, softmax and pooling are float32 always."""

DEFAULT_LENGTH = 512
"""Tokens an input may have where neither the checkpoint nor the architecture says."""

Leaves = Sequence[jax.Array]


@dataclass(frozen=True, eq=False)
class Model:
    """An encoder with its sentence-transformers modules, as pure functions of its weights.

    Attributes:
        checkpoint: what it was loaded from.
        architecture: the registry's entry.
        config: the architecture's Config.
        dtype: of the matrices.
        mesh: where the weights lie.
        leaves: the arrays, in the order of `paths`.
        dimension: D, the full size of a vector.
        max_length: tokens an input may have.
        structure: the module without its arrays.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    config: Any
    dtype: str
    mesh: Mesh
    leaves: tuple[jax.Array, ...]
    dimension: int
    max_length: int
    structure: "Structure"

    @property
    def paths(self) -> tuple[str, ...]:
        """The name of each parameter, such as "layers.0.query.kernel"."""
        return self.structure.paths

    @property
    def params(self) -> dict[str, jax.Array]:
        """The weights by name: a pytree that jax.grad and optimisers take."""
        return dict(zip(self.paths, self.leaves, strict=True))

    def encoder(self, leaves: Leaves) -> Any:
        """The NNX module with these weights. For use inside a traced function."""
        return self.structure.merge(leaves)

    def embed(
        self,
        leaves: Leaves,
        input_ids: Int[Array, "B T"],
        mask: Bool[Array, "B T"],
        prompt_lengths: Int[Array, " B"],
        dimensions: Int[Array, " B"],
        normalize: Bool[Array, " B"],
    ) -> Float[Array, "B P"]:
        """Encoder, pooling, matryoshka, norm. Pure and traceable; the arguments are those of `types.Batch`.

        Args:
            leaves: the weights, in the order of `paths`.
            input_ids: token ids.
            mask: tokens that are not padding.
            prompt_lengths: leading tokens that pooling leaves out, if the model leaves prompts out.
            dimensions: size to cut each row to; the features behind it are 0.
            normalize: L2-normalise this row?

        Returns:
            float32; P is `dimension`.
        """
        hidden = self.encoder(leaves).hidden_states(input_ids, mask)[-1]
        return finish(pool(hidden, mask, prompt_lengths, self.checkpoint.pooling), dimensions, normalize)

    def apply(
        self,
        params: Mapping[str, jax.Array],
        input_ids: Int[Array, "B T"],
        attention_mask: Int[Array, "B T"] | Bool[Array, "B T"],
    ) -> Float[Array, "B P"]:
        """The model as sentence-transformers runs it: encoder, pooling, and Normalize where the model has one.

        Pure: jit, grad and vmap accept it.

        Args:
            params: as `params`.
            input_ids: token ids.
            attention_mask: 1 or True for tokens that are not padding.

        Returns:
            float32; P is `dimension`.
        """
        rows = input_ids.shape[0]
        return self.embed(
            [params[path] for path in self.paths],
            input_ids,
            attention_mask.astype(bool),
            jnp.zeros((rows,), jnp.int32),
            jnp.full((rows,), self.dimension, jnp.int32),
            jnp.full((rows,), self.checkpoint.normalize, bool),
        )


class Structure:
    """A module without its arrays: shapes, dtypes and logical axes of every parameter, and the way back.

    Args:
        arch: the architecture.
        config: its Config.
        dtype: of the matrices.
    """

    def __init__(self, arch: Architecture, config: Any, dtype: str) -> None:
        abstract = nnx.eval_shape(lambda: arch.build(config, dtype))
        self._graph, state = nnx.split(abstract)
        self._flat = list(nnx.to_flat_state(state))
        self.paths = tuple(".".join(map(str, path)) for path, _ in self._flat)
        self.shapes = tuple(tuple(variable.shape) for _, variable in self._flat)
        self.dtypes = tuple(np.dtype(variable.dtype) for _, variable in self._flat)
        self.axes = tuple(variable.get_metadata("axes") for _, variable in self._flat)

    def merge(self, leaves: Leaves) -> Any:
        """The module with these arrays, which may be tracers."""
        pairs = zip(self._flat, leaves, strict=True)
        return nnx.merge(self._graph, nnx.from_flat_state([(path, var.replace(leaf)) for (path, var), leaf in pairs]))


def load(
    name: str | Path | Checkpoint,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    max_length: int | None = None,
    revision: str | None = None,
) -> Model:
    """Load a checkpoint onto a mesh.

    Args:
        name: what `Checkpoint.open` takes, or its result.
        dtype: "float32" or "bfloat16".
        mesh: from `make_mesh`; by default over all devices.
        max_length: tokens an input may have, in place of the checkpoint's own number.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: one of its kinds; see `errors`.
        ValueError: `dtype` or `max_length` is not possible.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    checkpoint = name if isinstance(name, Checkpoint) else Checkpoint.open(name, revision=revision)
    arch = architecture(checkpoint.config.get("model_type"))
    config = arch.config(checkpoint.config)
    # An explicit request may exceed the checkpoint's own limit, never the model's positions.
    longest = config.max_length
    known = [n for n in (checkpoint.max_length, longest) if n is not None]
    chosen = max_length if max_length is not None else min(known, default=DEFAULT_LENGTH)
    if chosen < 1 or (longest is not None and chosen > longest):
        raise ValueError(f"max_length is {chosen}; allowed: " + (f"1 to {longest}" if longest else "at least 1"))
    mesh = make_mesh() if mesh is None else mesh
    structure = Structure(arch, config, dtype)
    arrays = collect(arch, structure, Tensors(checkpoint.folder))
    leaves = tuple(
        place(array, wanted, mesh, axes)
        for array, wanted, axes in zip(arrays, structure.dtypes, structure.axes, strict=True)
    )
    return Model(
        checkpoint=checkpoint,
        architecture=arch,
        config=config,
        dtype=dtype,
        mesh=mesh,
        leaves=leaves,
        dimension=config.hidden_size * len(checkpoint.pooling.modes),
        max_length=chosen,
        structure=structure,
    )


def collect(arch: Architecture, structure: Structure, tensors: Tensors) -> list[npt.NDArray[Any]]:
    """Find every parameter's array in a checkpoint, in our layout; still views of the files.

    Raises:
        WeightsError: weights missing, left over, misshapen or not finite: all of them at once.
        UnsupportedModelError: the architecture's table lacks a parameter.
    """
    keys, doubles = original_names(arch, tensors)
    wanted = [checkpoint_name(arch, path) for path in structure.paths]
    prefix = max(arch.prefixes, key=lambda p: sum(p + weight.name in keys for weight in wanted))
    arrays: list[npt.NDArray[Any]] = []
    missing, misshapen, integers, unfinite = [], [], [], []
    for path, weight, shape in zip(structure.paths, wanted, structure.shapes, strict=True):
        key = keys.pop(prefix + weight.name, None)
        if key is None:
            missing.append(f"{prefix}{weight.name} (for {path})")
            continue
        stored = tensors[key]
        array = stored.T if weight.layout is Layout.TRANSPOSED else stored
        if array.shape != shape:
            misshapen.append(f"{key} has the shape {stored.shape}; as {path} it must give {shape}")
        elif stored.dtype.kind in "iub":
            integers.append(f"{key} holds {stored.dtype}, as a quantised model does")
        elif not np.isfinite(array).all():
            unfinite.append(f"{key} holds NaN or Inf")
        arrays.append(array)
    ignored = [re.compile(pattern) for pattern in arch.ignored]
    unexpected = sorted(
        key
        for name, key in keys.items()
        if not any(pattern.fullmatch(name.removeprefix(prefix)) for pattern in ignored)
    )
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "misshapen": misshapen,
        "not floating-point": integers,
        "not finite": unfinite,
        "two names for one weight": doubles,
    }
    found = {title: entries for title, entries in problems.items() if entries}
    if found:
        raise WeightsError(tensors.where, found)
    return arrays


def original_names(arch: Architecture, tensors: Tensors) -> tuple[dict[str, str], list[str]]:
    """Name after the architecture's renames -> key in the checkpoint; and the keys whose name another one has too."""
    names: dict[str, str] = {}
    doubles = []
    for key in tensors:
        name = key
        for pattern, replacement in arch.renames:
            name = re.sub(pattern, replacement, name)
        if name in names:
            doubles.append(f"{names[name]} and {key}")
        names[name] = key
    return names, doubles


def checkpoint_name(arch: Architecture, path: str) -> Weight:
    """Where the table says that a parameter stands; the layer's number goes from our path into its name."""
    number = re.search(r"\.(\d+)\.", path)
    n = number.group(1) if number else ""
    template = re.sub(r"\.\d+\.", ".{n}.", path, count=1)
    try:
        weight = arch.weights[template]
    except KeyError:
        raise UnsupportedModelError(f"models/{arch.model_type}: WEIGHTS has no line for {template!r}") from None
    return weight._replace(name=weight.name.replace("{n}", n))


def place(array: npt.NDArray[Any], dtype: np.dtype[Any], mesh: Mesh, axes: tuple[str, ...]) -> jax.Array:
    """Put one array onto the mesh, each device reading only its own part of the file."""
    sharding = parameter_sharding(mesh, axes, array.shape)

    def part(index: tuple[slice, ...] | None) -> npt.NDArray[Any]:
        # A copy: JAX would take an aligned array over as it is, and the model would change with the file.
        return np.array(array if index is None else array[index], dtype, order="C")

    return jax.make_array_from_callback(array.shape, sharding, part)
