"""Finding every parameter of a module in a checkpoint, and putting it onto the mesh.

The *module* is walked: every parameter is looked up, and every checkpoint key that is left over must be one that is
rightly so. Nothing is ever filled in at random; one error lists all that is wrong.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import Mesh

from jaxembed.architecture import Layout, Names, Weight, Weights
from jaxembed.errors import UnsupportedModelError, WeightsError
from jaxembed.memory import Arena
from jaxembed.sharding import parameter_sharding
from jaxembed.tensors import Tensors

__all__ = ["Leaves", "Structure", "collect", "place"]

Leaves = Sequence[jax.Array]


class Structure:
    """A module without its arrays: shapes, dtypes and logical axes of every parameter, and the way back.

    Args:
        build: makes the module; called under `nnx.eval_shape`.
    """

    def __init__(self, build: Callable[[], Any]) -> None:
        abstract = nnx.eval_shape(build)
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


def collect(names: Names, structure: Structure, tensors: Tensors) -> list[npt.NDArray[Any]]:
    """Find every parameter's array in a checkpoint, in our layout; still views of the files.

    Raises:
        WeightsError: weights missing, left over, misshapen or not finite: all of them at once.
        UnsupportedModelError: the architecture's table lacks a parameter.
    """
    keys, doubles = original_names(names, tensors)
    prefix, wanted = best_names(names, structure, keys)
    arrays: list[npt.NDArray[Any]] = []
    missing, misshapen, integers, unfinite = [], [], [], []
    used: set[str] = set()
    for path, weight, shape, dtype in zip(structure.paths, wanted, structure.shapes, structure.dtypes, strict=True):
        # A head stands beside the encoder, without the encoder's prefix.
        name = next((n for n in (prefix + weight.name, weight.name) if n in keys), None)
        if name is None:
            missing.append(f"{prefix}{weight.name} (for {path})")
            continue
        used.add(name)
        key = keys[name]
        stored = tensors[key]
        array = laid_out(stored, weight)
        if array is None or array.shape != shape:
            misshapen.append(f"{key} has the shape {stored.shape}; as {path} it must give {shape}")
            continue
        if stored.dtype.kind in "iub" and dtype.kind not in "iu":
            integers.append(f"{key} holds {stored.dtype}, as a quantised model does")
        elif not np.isfinite(array).all():
            unfinite.append(f"{key} holds NaN or Inf")
        arrays.append(array)
    ignored = [re.compile(pattern) for pattern in names.ignored]
    unexpected = sorted(
        key
        for name, key in keys.items()
        if name not in used and not any(pattern.fullmatch(name.removeprefix(prefix)) for pattern in ignored)
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


def original_names(names: Names, tensors: Tensors) -> tuple[dict[str, str], list[str]]:
    """Name after the renames -> key in the checkpoint; and the keys whose name another one has too."""
    keys: dict[str, str] = {}
    doubles = []
    for key in tensors:
        name = key
        for pattern, replacement in names.renames:
            name = re.sub(pattern, replacement, name)
        if name in keys:
            doubles.append(f"{keys[name]} and {key}")
        keys[name] = key
    return keys, doubles


def best_names(names: Names, structure: Structure, keys: Mapping[str, str]) -> tuple[str, list[Weight]]:
    """The prefix and the table, of those the architecture knows, under which most parameters are found."""

    def found(choice: tuple[str, list[Weight]]) -> int:
        prefix, wanted = choice
        return sum(prefix + weight.name in keys or weight.name in keys for weight in wanted)

    tables = (names.weights, *names.alternatives)
    choices = [[checkpoint_name(names, table, path) for path in structure.paths] for table in tables]
    return max(((prefix, wanted) for wanted in choices for prefix in names.prefixes), key=found)


def checkpoint_name(names: Names, table: Weights, path: str) -> Weight:
    """Where a table says that a parameter stands; the numbers in our path, {n} and {m}, go into its name."""
    number = r"(?<=\.)\d+(?=\.)"
    numbers = dict(zip(("{n}", "{m}"), re.findall(number, path), strict=False))
    template = path
    for mark in numbers:
        template = re.sub(number, mark, template, count=1)
    try:
        weight = table[template]
    except KeyError:
        raise UnsupportedModelError(f"{names.where}: WEIGHTS has no line for {template!r}") from None
    name = weight.name
    for mark, value in numbers.items():
        name = name.replace(mark, value)
    return weight._replace(name=name)


def laid_out(stored: npt.NDArray[Any], weight: Weight) -> npt.NDArray[Any] | None:
    """A stored array in our layout, a view; None where it cannot be cut or turned as the table says."""
    i, k = weight.part
    if k > 1:
        if not stored.ndim or stored.shape[0] % k:
            return None
        rows = stored.shape[0] // k
        stored = stored[i * rows : (i + 1) * rows]
    if weight.layout is Layout.TRANSPOSED:
        return np.swapaxes(stored, -1, -2) if stored.ndim > 1 else None
    return stored


def place(
    array: npt.NDArray[Any], dtype: np.dtype[Any], mesh: Mesh, axes: tuple[str, ...], arena: Arena | None = None
) -> jax.Array:
    """Put one array onto the mesh, each device reading only its own part of the file.

    Args:
        array: a view of the file.
        dtype: what it becomes.
        mesh: the devices.
        axes: logical names of its axes.
        arena: where it is to lie, for devices that compute in the host's memory.
    """
    sharding = parameter_sharding(mesh, axes, array.shape)
    empty = np.empty if arena is None else arena.empty

    def part(index: tuple[slice, ...] | None) -> npt.NDArray[Any]:
        # A copy: JAX takes an aligned array over as it is, and the model would change with the file.
        wanted = array if index is None else array[index]
        copy: npt.NDArray[Any] = empty(wanted.shape, dtype)
        copy[...] = wanted
        return copy

    return jax.make_array_from_callback(array.shape, sharding, part)
