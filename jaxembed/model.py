"""An encoder and the modules behind it, as pure functions of their weights. What puts those there is `loading`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION, Architecture, Names
from jaxembed.chain import Features
from jaxembed.checkpoint import Checkpoint
from jaxembed.m3 import conversion, lexical
from jaxembed.pooling import finish, splade
from jaxembed.tokens import Tokens
from jaxembed.types import Output, SpladePooling
from jaxembed.weights import Leaves, Structure

__all__ = ["Model", "Part"]


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
    parts: tuple[Part, ...]
    branches: Mapping[Output, Part] = field(default_factory=dict)
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
        vectors: Float[Array, "B T E"] = layers[output](last_state(chain[0], tokens))
        return vectors

    def features(self, leaves: Leaves, tokens: Tokens, prompt_lengths: Int[Array, " B"]) -> Features:
        """Encoder and steps, in lines: hidden states, token vectors and, where there is Pooling, one vector a text."""
        encoder, *steps = self.chain(leaves)
        features = Features(tuple(encoder.hidden_states(tokens)), tokens, prompt_lengths)
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
                vectors = self.features(leaves, tokens, prompt_lengths).states[-1]
                return finish(tokens.rows.apart(vectors), dimensions, normalize)
            case Output.SPARSE if output in self.branches:
                weights = self.branch(output, leaves, tokens)[:, :, 0]
                ids, size = tokens.padded.input_ids, self.config.vocab_size
                return lexical(weights, ids, tokens.mask, vocab_size=size, left_out=self.left_out)
            case Output.SPARSE if self.architecture.sparse:
                row: Float[Array, "B V"] = self.encoder(leaves).sparse(tokens)
                return row
            case Output.SPARSE:
                encoder = self.encoder(leaves)
                logits = encoder.head(last_state(encoder, tokens), encoder)
                return splade(logits, tokens.mask, self.checkpoint.splade or SpladePooling())
            case Output.SCORES:
                encoder = self.encoder(leaves)
                scores: Float[Array, "B L"] = encoder.head(last_state(encoder, tokens), tokens.mask)
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


def last_state(encoder: Any, tokens: Tokens) -> Float[Array, "B T D"]:
    """An encoder's last hidden state by rows, whether the batch is padded or flat."""
    state: Float[Array, "B T D"] = tokens.rows.apart(encoder.hidden_states(tokens)[-1])
    return state


def merged(parts: Sequence[Part], leaves: Leaves) -> tuple[list[Any], Leaves]:
    """The modules of parts, with the first of the arrays given; and the arrays left over."""
    modules = []
    for part in parts:
        own = len(part.structure.paths)
        modules.append(part.structure.merge(leaves[:own]))
        leaves = leaves[own:]
    return modules, leaves
