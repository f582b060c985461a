"""The device mesh, and the one table: logical axis -> mesh axis.

A parameter names its axes once, where it is declared; nothing is guessed from names of weights.
"""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

__all__ = ["AXES", "DATA", "MODEL", "batch_sharding", "make_mesh", "parameter_sharding", "platform"]

DATA = "data"
MODEL = "model"

AXES: Mapping[str, str | None] = {
    "vocab": None,
    "position": None,
    "token_type": None,
    "embed": None,
    "head_dim": None,
    "label": None,
    "layer": None,
    "adapter": None,
    "rank": None,
    "heads": MODEL,
    "mlp": MODEL,
}
"""Where each logical axis of a parameter lies. None: replicated."""


def make_mesh(devices: Sequence[jax.Device] | None = None, *, model_parallel: int = 1) -> Mesh:
    """A mesh with the axes ('data', 'model').

    Args:
        devices: the devices to use; None for all of the default backend.
        model_parallel: devices that share one copy of the weights (size of the 'model' axis).

    Raises:
        ValueError: the devices do not divide by `model_parallel`.
    """
    chosen = list(jax.devices() if devices is None else devices)
    if model_parallel < 1 or not chosen or len(chosen) % model_parallel:
        raise ValueError(f"{len(chosen)} devices do not divide into groups of model_parallel={model_parallel}")
    grid = np.array(chosen).reshape(-1, model_parallel)
    return Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def platform(mesh: Mesh) -> str:
    """What kind of devices a mesh is of: "cpu", "gpu" or "tpu"."""
    kind: str = mesh.devices.flat[0].platform
    return kind


def parameter_sharding(mesh: Mesh, axes: Sequence[str], shape: Sequence[int]) -> NamedSharding:
    """Where a parameter lies; an axis that does not divide over its mesh axis is replicated.

    Args:
        mesh: from `make_mesh`.
        axes: logical names, one for each dimension.
        shape: the parameter's shape.

    Raises:
        KeyError: an axis name that the table does not hold.
        ValueError: not one name for each dimension.
    """
    if len(axes) != len(shape):
        raise ValueError(f"a parameter of shape {tuple(shape)} names the axes {tuple(axes)}")
    places = []
    for axis, size in zip(axes, shape, strict=True):
        place = AXES[axis]
        places.append(place if place is not None and size % mesh.shape[place] == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*places))


def batch_sharding(mesh: Mesh, ndim: int) -> NamedSharding:
    """Where an array of a batch lies: its first axis over 'data', the others whole."""
    return NamedSharding(mesh, PartitionSpec(DATA, *([None] * (ndim - 1))))
