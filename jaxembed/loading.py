"""Registry + checkpoint + mesh -> a Model with its weights on the devices."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxembed.architecture import Architecture
from jaxembed.chain import build_step, step_names, width_after
from jaxembed.checkpoint import Checkpoint
from jaxembed.colbert import STANFORD
from jaxembed.errors import UnsupportedModelError
from jaxembed.m3 import FILES, LEFT_OUT, NAMES, build_branch
from jaxembed.memory import Arena
from jaxembed.model import Model, Part
from jaxembed.models import architecture
from jaxembed.modules import Module
from jaxembed.sharding import make_mesh, parameter_sharding, platform
from jaxembed.tensors import Tensors
from jaxembed.tokenizer_files import read_tokenizer
from jaxembed.types import Output, Pooling, SpladePooling
from jaxembed.weights import Structure, collect, place

__all__ = ["DTYPES", "Placed", "load"]

DTYPES = ("float32", "bfloat16")
"""What the matrices may be held in. Norms, biases, softmax and pooling are float32 always."""

Placed = dict[tuple[Path, str], jax.Array]
"""Arrays that are on the devices already, by folder and parameter."""


def load(
    name: str | Path | Checkpoint,
    *,
    dtype: str = "float32",
    mesh: Mesh | None = None,
    max_length: int | None = None,
    revision: str | None = None,
    placed: Placed | None = None,
    abstract: bool = False,
) -> Model:
    """Load a checkpoint onto a mesh.

    Args:
        name: what `Checkpoint.open` takes, or its result.
        dtype: "float32" or "bfloat16".
        mesh: from `make_mesh`; by default over all devices.
        max_length: tokens an input may have, in place of the checkpoint's own number.
        revision: branch, tag or commit on the hub.
        placed: arrays of another route of the same checkpoint, which are not loaded again; this one's are added.
        abstract: leave the weights where they are. The leaves say only what each is like (jax.ShapeDtypeStruct), which
            is enough to compile with.

    Raises:
        CheckpointError: one of its kinds; see `errors`.
        ValueError: `dtype` or `max_length` is not possible.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    checkpoint = name if isinstance(name, Checkpoint) else Checkpoint.open(name, revision=revision)
    arch = architecture(checkpoint.config)
    config = arch.config(checkpoint.config)
    # An explicit request may exceed the checkpoint's own limit, never the model's positions.
    longest = config.max_length
    known = [n for n in (checkpoint.max_length, longest) if n is not None]
    chosen = max_length if max_length is not None else min(known, default=arch.default_length)
    if chosen < 1 or (longest is not None and chosen > longest):
        raise ValueError(f"max_length is {chosen}; allowed: " + (f"1 to {longest}" if longest else "at least 1"))
    mesh = make_mesh() if mesh is None else mesh
    arch, head = headed(checkpoint, arch)
    if STANFORD in (checkpoint.config.get("architectures") or ()):
        # The projection's, which the chain has, stand among the encoder's weights.
        arch = replace(arch, ignored=(*arch.ignored, r"linear\.weight"))
    parts = [Part("", Structure(lambda: arch.build(config, dtype)), arch, checkpoint.folder)]
    dimension = token_dimension = config.hidden_size
    pooled = False
    for spec in checkpoint.modules:
        if isinstance(spec, SpladePooling):
            continue
        dimension = width_after(spec, dimension, layers=getattr(config, "num_hidden_layers", 0))
        pooled = pooled or isinstance(spec, Pooling)
        token_dimension = token_dimension if pooled else dimension
        parts.append(part_of(spec, dtype, checkpoint.folder))
    branches = branches_of(checkpoint.folder, config.hidden_size, dtype)
    if Output.TOKENS in branches:
        token_dimension = branches[Output.TOKENS].structure.shapes[-1][-1]
    every = (*parts, *branches.values())
    leaves: list[Any]
    if abstract:
        leaves = [leaf for part in every for leaf in abstract_leaves(part, mesh)]
    else:
        placed = {} if placed is None else placed
        arena = Arena() if platform(mesh) == "cpu" else None
        leaves = [leaf for part in every for leaf in placed_leaves(part, mesh, placed, arena)]
    return Model(
        checkpoint=checkpoint,
        architecture=arch,
        config=config,
        dtype=dtype,
        mesh=mesh,
        leaves=tuple(leaves),
        dimension=dimension,
        token_dimension=token_dimension,
        max_length=chosen,
        head=head,
        tasks=tuple(arch.tasks(checkpoint.config)),
        parts=tuple(parts),
        branches=branches,
        left_out=unweighted(checkpoint.folder) if Output.SPARSE in branches else (),
    )


def headed(checkpoint: Checkpoint, arch: Architecture) -> tuple[Architecture, str | None]:
    """The architecture with the head that a checkpoint says it has, and the head's task; as it is, and None, where the
    checkpoint holds none of it and gives vectors without it.

    Raises:
        UnsupportedModelError: nothing can be had of the checkpoint without a head that is not implemented.
    """
    if checkpoint.head is None:
        return arch, None
    head, needed = arch.heads.get(checkpoint.head), checkpoint.pooling is None
    if head is None:
        if needed:
            known = ", ".join(arch.heads) or "none"
            raise UnsupportedModelError(f"{arch.where} has no head for {checkpoint.head}; heads it has: {known}")
        return arch, None
    stored = Tensors(checkpoint.folder)
    names = (prefix + weight.name for weight in head.weights.values() for prefix in arch.prefixes)
    if not needed and not any(name in stored for name in names):
        return arch, None
    return arch.with_head(head, head.fitted(checkpoint.config, stored)), checkpoint.head


def part_of(spec: Module, dtype: str, folder: Path) -> Part:
    """The step that a description asks for; its parameters are named by its folder."""
    folder = getattr(spec, "folder", folder)
    structure, names = Structure(lambda: build_step(spec, dtype)), step_names(spec)
    if names is not None and getattr(spec, "beside", False):
        return Part("", structure, replace(names, ignored=(".*",)), folder)
    return Part(f"{folder.name}.", structure, names, folder)


def branches_of(folder: Path, width: int, dtype: str) -> dict[Output, Part]:
    """The layers that stand in files of their own beside the encoder's, by output; parameters bear the files' names."""
    files = {output: folder / f"{name}.safetensors" for output, name in FILES.items()}
    return {
        output: Part(f"{file.stem}.", Structure(partial(build_branch, output, file, width, dtype)), NAMES, file)
        for output, file in files.items()
        if file.is_file()
    }


def unweighted(folder: Path) -> tuple[int, ...]:
    """The ids of the special tokens that get no weight in a branch's sparse vectors."""
    roles = read_tokenizer(folder).roles
    return tuple(roles[name] for name in LEFT_OUT if name in roles)


def abstract_leaves(part: Part, mesh: Mesh) -> list[jax.ShapeDtypeStruct]:
    """What a part's arrays on the mesh would be like."""
    structure = part.structure
    return [
        jax.ShapeDtypeStruct(shape, dtype, sharding=parameter_sharding(mesh, axes, shape))
        for shape, dtype, axes in zip(structure.shapes, structure.dtypes, structure.axes, strict=True)
    ]


def placed_leaves(part: Part, mesh: Mesh, placed: Placed, arena: Arena | None) -> list[jax.Array]:
    """A part's arrays on the mesh: those that are there already, or else read from its folder."""
    if part.names is None:
        return []
    structure = part.structure
    keys = [(part.folder, path) for path in structure.paths]
    if not all(key in placed for key in keys):
        arrays = collect(part.names, structure, Tensors(part.folder))
        for key, array, wanted, axes in zip(keys, arrays, structure.dtypes, structure.axes, strict=True):
            placed[key] = place(array, wanted, mesh, axes, arena)
    return [placed[key] for key in keys]
