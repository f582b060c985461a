"""Registry + checkpoint + mesh -> a Model with its weights on the devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxembed.checkpoint import Checkpoint
from jaxembed.layers import Tokens
from jaxembed.models import architecture
from jaxembed.pooling import finish, pool
from jaxembed.sharding import make_mesh
from jaxembed.tensors import Tensors
from jaxembed.types import Architecture
from jaxembed.weights import Leaves, Structure, collect, place

__all__ = ["DTYPES", "Model", "load"]

DTYPES = ("float32", "bfloat16")
"""What the matrices may be held in. Norms, biases, softmax and pooling are float32 always."""

DEFAULT_LENGTH = 512
"""Tokens an input may have where neither the checkpoint nor the architecture says."""


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
        tokens: Tokens,
        prompt_lengths: Int[Array, " B"],
        dimensions: Int[Array, " B"],
        normalize: Bool[Array, " B"],
    ) -> Float[Array, "B P"]:
        """Encoder, pooling, matryoshka, norm. Pure and traceable; the arguments are those of `types.Batch`.

        Args:
            leaves: the weights, in the order of `paths`.
            tokens: ids, padding, token types and tasks.
            prompt_lengths: leading tokens that pooling leaves out, if the model leaves prompts out.
            dimensions: size to cut each row to; the features behind it are 0.
            normalize: L2-normalise this row?

        Returns:
            float32; P is `dimension`.
        """
        hidden = self.encoder(leaves).hidden_states(tokens)[-1]
        return finish(pool(hidden, tokens.mask, prompt_lengths, self.checkpoint.pooling), dimensions, normalize)

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
            Tokens.plain(input_ids, attention_mask.astype(bool)),
            jnp.zeros((rows,), jnp.int32),
            jnp.full((rows,), self.dimension, jnp.int32),
            jnp.full((rows,), self.checkpoint.normalize, bool),
        )


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
    arch = architecture(checkpoint.config)
    config = arch.config(checkpoint.config)
    # An explicit request may exceed the checkpoint's own limit, never the model's positions.
    longest = config.max_length
    known = [n for n in (checkpoint.max_length, longest) if n is not None]
    chosen = max_length if max_length is not None else min(known, default=DEFAULT_LENGTH)
    if chosen < 1 or (longest is not None and chosen > longest):
        raise ValueError(f"max_length is {chosen}; allowed: " + (f"1 to {longest}" if longest else "at least 1"))
    mesh = make_mesh() if mesh is None else mesh
    structure = Structure(lambda: arch.build(config, dtype))
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
