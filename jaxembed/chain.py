"""The modules behind the encoder, on the device: hidden states -> one vector a text, or one a token.

Formulas are those of sentence-transformers 6.2. Everything is float32; the matrices of Dense may be bfloat16.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxembed import modules
from jaxembed.architecture import Names, Weight
from jaxembed.blocks import linear_weights, norm_weights
from jaxembed.errors import UnsupportedModelError
from jaxembed.layers import LayerNorm, Linear, activation, parameter
from jaxembed.pooling import pool, unit
from jaxembed.tokens import Tokens
from jaxembed.types import Pooling, SpladePooling

__all__ = ["Features", "build_step", "step_names", "width_after"]

TORCH_EPS = 1e-5


class Features(NamedTuple):
    """What travels along the chain.

    Attributes:
        states: hidden states, in lines; the last one is what the encoder gives.
        tokens: what it was called with.
        prompt_lengths: leading tokens that pooling leaves out.
        vectors: one vector a text, once they are pooled.
    """

    states: tuple[Float[Array, "L M D"], ...]
    tokens: Tokens
    prompt_lengths: Int[Array, " B"]
    vectors: Float[Array, "B P"] | None = None

    def with_tokens(self, x: Float[Array, "L M E"]) -> "Features":
        """The same with other token vectors."""
        return self._replace(states=(*self.states[:-1], x))

    @property
    def pooled(self) -> Float[Array, "B P"]:
        """The vectors; a chain that gets here without Pooling was refused when it was read."""
        assert self.vectors is not None
        return self.vectors


class PoolStep(nnx.Module):
    """Pooling."""

    def __init__(self, spec: Pooling) -> None:
        self.spec = spec

    def __call__(self, features: Features) -> Features:
        vectors = pool(features.states[-1], features.tokens.rows, features.prompt_lengths, self.spec)
        return features._replace(vectors=vectors)


class DenseStep(nnx.Module):
    """Dense, of texts' vectors or of tokens'."""

    def __init__(self, spec: modules.Dense, dtype: str) -> None:
        size, axes = (spec.in_features, spec.out_features), ("embed", "embed")
        self.linear = Linear(size, axes, dtype, bias=spec.bias)
        projected = spec.residual and spec.in_features != spec.out_features
        self.residual = Linear(size, axes, dtype, bias=False) if projected else None
        self.activation = activation(spec.activation)
        self.adds = spec.residual
        self.on_tokens = spec.tokens

    def __call__(self, features: Features) -> Features:
        if self.on_tokens:
            return features.with_tokens(self.of(features.states[-1]))
        return features._replace(vectors=self.of(features.pooled[:, None])[:, 0])

    def of(self, x: Float[Array, "L M In"]) -> Float[Array, "L M Out"]:
        """Of each vector."""
        y = self.activation(self.linear(x))
        if not self.adds:
            return y
        return y + (x if self.residual is None else self.residual(x))


class LayerNormStep(nnx.Module):
    """LayerNorm of texts' vectors."""

    def __init__(self, spec: modules.LayerNorm) -> None:
        self.norm = LayerNorm(spec.dimension, TORCH_EPS)

    def __call__(self, features: Features) -> Features:
        return features._replace(vectors=self.norm(features.pooled))


class LayersStep(nnx.Module):
    """WeightedLayerPooling: sum of w_l * state_l / sum of w_l."""

    def __init__(self, spec: modules.WeightedLayerPooling) -> None:
        self.weights = parameter((spec.layers + 1 - spec.layer_start,), ("layer",))
        self.start = spec.layer_start

    def __call__(self, features: Features) -> Features:
        states = jnp.stack(features.states[self.start :])
        weights = self.weights[...]
        return features.with_tokens(jnp.sum(states * weights[:, None, None, None], axis=0) / jnp.sum(weights))


class NormalizeStep(nnx.Module):
    """L2 norm, where it does not end the chain: there it is a row's own choice (`pooling.finish`)."""

    def __init__(self, spec: modules.Normalize) -> None:
        self.on_tokens = spec.tokens

    def __call__(self, features: Features) -> Features:
        if self.on_tokens:
            return features.with_tokens(unit(features.states[-1]))
        return features._replace(vectors=unit(features.pooled))


def build_step(spec: modules.Module, dtype: str) -> Any:
    """The step that a description asks for; called under `nnx.eval_shape`."""
    match spec:
        case Pooling():
            return PoolStep(spec)
        case modules.Dense():
            return DenseStep(spec, dtype)
        case modules.LayerNorm():
            return LayerNormStep(spec)
        case modules.WeightedLayerPooling():
            return LayersStep(spec)
        case modules.Normalize():
            return NormalizeStep(spec)
        case SpladePooling():
            raise TypeError("sparse vectors do not go along the chain")


def step_names(spec: modules.Module) -> Names | None:
    """Where the step's weights stand in its folder; None for a step without any."""
    match spec:
        case modules.Dense():
            return Names(
                weights={**linear_weights("linear", "linear"), **linear_weights("residual", "residual", bias=False)}
            )
        case modules.LayerNorm():
            return Names(weights=norm_weights("norm", "norm"))
        case modules.WeightedLayerPooling():
            return Names(weights={"weights": Weight("layer_weights")})
        case _:
            return None


def width_after(spec: modules.Module, width: int, *, layers: int) -> int:
    """Features of a vector behind a step.

    Args:
        spec: the step.
        width: features before it.
        layers: hidden states that the encoder gives, the embeddings' output not counted.

    Raises:
        UnsupportedModelError: the step does not fit what comes before it.
    """
    match spec:
        case Pooling(modes=modes):
            return width * len(modes)
        case modules.Dense(in_features=size, out_features=after):
            pass
        case modules.LayerNorm(dimension=size):
            after = size
        case modules.WeightedLayerPooling(layers=given, layer_start=start):
            if given != layers:
                raise UnsupportedModelError(f"WeightedLayerPooling is of {given} layers, but the model has {layers}")
            if not 0 <= start <= layers:
                raise UnsupportedModelError(f"WeightedLayerPooling's layer_start is {start}; allowed: 0 to {layers}")
            return width
        case _:
            return width
    if size != width:
        raise UnsupportedModelError(f"{type(spec).__name__} takes {size} features, but gets {width}")
    return after
