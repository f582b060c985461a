"""Registry + checkpoint + mesh -> a Model with its weights on the devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxembed.chain import Features, build_step, step_names, width_after
from jaxembed.checkpoint import Checkpoint
from jaxembed.colbert import STANFORD
from jaxembed.errors import UnsupportedModelError
from jaxembed.m3 import FILES, LEFT_OUT, NAMES, build_branch, conversion, lexical
from jaxembed.memory import Arena
from jaxembed.models import architecture
from jaxembed.modules import Module
from jaxembed.pooling import finish, splade
from jaxembed.sharding import make_mesh, parameter_sharding
from jaxembed.tensors import Tensors
from jaxembed.tokenizer_files import read_tokenizer
from jaxembed.tokens import Tokens
from jaxembed.types import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture, Names, Output, Pooling, SpladePooling
from jaxembed.weights import Leaves, Structure, collect, place

__all__ = ["DTYPES", "Model", "Placed", "load"]

DTYPES = ("float32", "bfloat16")
"""What the matrices may be held in. Norms, biases, softmax and pooling are float32 always."""


@dataclass(frozen=True, eq=False)
class Model:
    """An encoder with its sentence-transformers modules, as pure functions of its weights.

    Attributes:
        checkpoint: what it was loaded from.
        architecture: the registry's entry.
        config: the architecture's Config.
        dtype: of the matrices.
        mesh: where the weights lie.
        leaves: the arrays (jax.Array), in the order of `paths`; what they are like, of an abstract model.
        dimension: D, the full size of a vector; of a token's vector where texts get no single one.
        token_dimension: E, the full size of a token's vector.
        max_length: tokens an input may have.
        head: the task that the encoder has a head for; None for none.
        tasks: names of the tasks that a row may ask for, in the order of their numbers.
        parts: the encoder and the modules behind it, without their arrays.
        branches: output -> the layer on the encoder's hidden states that gives it, where one stands beside the chain.
        left_out: entries of the vocabulary that get no weight in `Output.SPARSE` of a branch.
    """

    checkpoint: Checkpoint
    architecture: Architecture
    config: Any
    dtype: str
    mesh: Mesh
    leaves: tuple[Any, ...]
    dimension: int
    token_dimension: int
    max_length: int
    head: str | None
    tasks: tuple[str, ...]
    parts: tuple["Part", ...]
    branches: Mapping[Output, "Part"] = field(default_factory=dict)
    left_out: tuple[int, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """The name of each parameter, such as "layers.0.query.kernel" or "2_Dense.linear.kernel"."""
        parts = (*self.parts, *self.branches.values())
        return tuple(part.prefix + path for part in parts for path in part.structure.paths)

    @property
    def params(self) -> dict[str, jax.Array]:
        """The weights by name: a pytree that jax.grad and optimisers take."""
        return dict(zip(self.paths, self.leaves, strict=True))

    def encoder(self, leaves: Leaves) -> Any:
        """The encoder's NNX module with these weights. For use inside a traced function."""
        return self.chain(leaves)[0]

    def chain(self, leaves: Leaves) -> list[Any]:
        """The encoder and the steps behind it, with these weights. For use inside a traced function."""
        return merged(self.parts, leaves)[0]

    def branch(self, output: Output, leaves: Leaves, tokens: Tokens) -> Float[Array, "B T E"]:
        """What the branch of an output makes of the encoder's last hidden state. For use inside a traced function."""
        chain, others = merged(self.parts, leaves)
        layers = dict(zip(self.branches, merged(tuple(self.branches.values()), others)[0], strict=True))
        vectors: Float[Array, "B T E"] = layers[output](states(chain[0], tokens)[-1])
        return vectors

    def features(self, leaves: Leaves, tokens: Tokens, prompt_lengths: Int[Array, " B"]) -> Features:
        """Encoder and steps: hidden states, token vectors and, where there is Pooling, one vector a text."""
        encoder, *steps = self.chain(leaves)
        features = Features(states(encoder, tokens), tokens, prompt_lengths)
        for step in steps:
            features = step(features)
        return features

    @property
    def outputs(self) -> frozenset[Output]:
        """What this model can give of a row."""
        if self.architecture.sparse:
            return frozenset((Output.SPARSE,))
        dense = self.checkpoint.pooling is not None
        given = {
            Output.DENSE: dense,
            # What goes into a head and no further is nothing to be compared.
            Output.TOKENS: dense or self.head is None,
            Output.SPARSE: self.head == FILL_MASK or Output.SPARSE in self.branches,
            Output.SCORES: self.head == SEQUENCE_CLASSIFICATION,
        }
        # Without the branch that stands there as a pickle, token vectors would be others.
        return frozenset(
            output for output, there in given.items() if there and conversion(self.checkpoint.folder, output) is None
        )

    def compute(
        self,
        output: Output,
        leaves: Leaves,
        tokens: Tokens,
        prompt_lengths: Int[Array, " B"],
        dimensions: Int[Array, " B"],
        normalize: Bool[Array, " B"],
    ) -> Float[Array, "B *shape"]:
        """One of `outputs`, whose shapes `Output` says; the other arguments are those of `embed`.

        Vectors and token vectors are cut and normalised as their rows ask; the other outputs are not.
        """
        match output:
            case Output.DENSE:
                return self.embed(leaves, tokens, prompt_lengths, dimensions, normalize)
            case Output.TOKENS if output in self.branches:
                return finish(self.branch(output, leaves, tokens), dimensions, normalize)
            case Output.TOKENS:
                return finish(self.features(leaves, tokens, prompt_lengths).states[-1], dimensions, normalize)
            case Output.SPARSE if output in self.branches:
                weights = self.branch(output, leaves, tokens)[:, :, 0]
                ids, size = tokens.padded.input_ids, self.config.vocab_size
                return lexical(weights, ids, tokens.mask, vocab_size=size, left_out=self.left_out)
            case Output.SPARSE if self.architecture.sparse:
                row: Float[Array, "B V"] = self.encoder(leaves).sparse(tokens)
                return row
            case Output.SPARSE:
                encoder = self.encoder(leaves)
                logits = encoder.head(states(encoder, tokens)[-1], encoder)
                return splade(logits, tokens.mask, self.checkpoint.splade or SpladePooling())
            case Output.SCORES:
                encoder = self.encoder(leaves)
                scores: Float[Array, "B L"] = encoder.head(states(encoder, tokens)[-1], tokens.mask)
                return scores

    def embed(
        self,
        leaves: Leaves,
        tokens: Tokens,
        prompt_lengths: Int[Array, " B"],
        dimensions: Int[Array, " B"],
        normalize: Bool[Array, " B"],
    ) -> Float[Array, "B P"]:
        """Encoder, steps, matryoshka, norm. Pure and traceable; the arguments are those of `types.Batch`.

        Args:
            leaves: the weights, in the order of `paths`.
            tokens: ids, padding, token types and tasks.
            prompt_lengths: leading tokens that pooling leaves out, if the model leaves prompts out.
            dimensions: size to cut each row to; the features behind it are 0.
            normalize: L2-normalise this row?

        Returns:
            float32; P is `dimension`.
        """
        return finish(self.features(leaves, tokens, prompt_lengths).pooled, dimensions, normalize)

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


@dataclass(frozen=True, eq=False)
class Part:
    """One module of a model: its structure, and where its weights stand.

    Attributes:
        prefix: stands before the names of its parameters.
        structure: the module without its arrays.
        names: what the checkpoint calls its parameters; None for a module without any.
        folder: holds them.
    """

    prefix: str
    structure: Structure
    names: Names | None
    folder: Path


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
    placed = {} if placed is None else placed
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
    return Model(
        checkpoint=checkpoint,
        architecture=arch,
        config=config,
        dtype=dtype,
        mesh=mesh,
        leaves=tuple(leaf for part in (*parts, *branches.values()) for leaf in leaves_of(part, mesh, placed, abstract)),
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


def states(encoder: Any, tokens: Tokens) -> tuple[Float[Array, "B T D"], ...]:
    """An encoder's hidden states by rows, whether the batch is padded or flat."""
    return tuple(tokens.rows.apart(state) for state in encoder.hidden_states(tokens))


def merged(parts: Sequence[Part], leaves: Leaves) -> tuple[list[Any], Leaves]:
    """The modules of parts, with the first of the arrays given; and the arrays left over."""
    modules = []
    for part in parts:
        own = len(part.structure.paths)
        modules.append(part.structure.merge(leaves[:own]))
        leaves = leaves[own:]
    return modules, leaves


def leaves_of(part: Part, mesh: Mesh, placed: Placed, abstract: bool) -> list[Any]:
    """A part's arrays on the mesh: those that are there already, or else read from its folder; or abstract ones."""
    if part.names is None:
        return []
    structure = part.structure
    if abstract:
        return [
            jax.ShapeDtypeStruct(shape, dtype, sharding=parameter_sharding(mesh, axes, shape))
            for shape, dtype, axes in zip(structure.shapes, structure.dtypes, structure.axes, strict=True)
        ]
    keys = [(part.folder, path) for path in structure.paths]
    if not all(key in placed for key in keys):
        arrays = collect(part.names, structure, Tensors(part.folder))
        arena = Arena() if mesh.devices.flat[0].platform == "cpu" else None
        for key, array, wanted, axes in zip(keys, arrays, structure.dtypes, structure.axes, strict=True):
            placed[key] = place(array, wanted, mesh, axes, arena)
    return [placed[key] for key in keys]
