"""Rotary position embeddings (https://arxiv.org/abs/2104.09864): their kind out of config.json, and turning heads.

The frequencies are transformers' (`modeling_rope_utils`), for the kinds "default", "linear", "dynamic", "llama3" and
"yarn"; another kind raises.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int

from jaxembed.errors import UnsupportedModelError

__all__ = ["Rotary", "Turn", "read_rotary"]


@dataclass(frozen=True)
class Rotary:
    """Angle per place of each pair of features.

    Attributes:
        frequencies: radians per place, one for each of the R / 2 pairs; R <= H features are turned.
        magnitude: cosine and sine are multiplied by it ("yarn" has one; otherwise 1).
        interleaved: pairs are neighbours (0, 1), (2, 3), ...; otherwise i and i + R / 2.
    """

    frequencies: tuple[float, ...]
    magnitude: float = 1.0
    interleaved: bool = False

    def turn(self, places: Int[Array, "_ M"], slower: Float[Array, "_ _ R"] | float = 1.0) -> "Turn":
        """Cosines and sines of places. Traceable; computed once a call, used in every layer.

        Args:
            places: of the tokens in their rows.
            slower: the frequencies are multiplied by it, which may be each token's own.
        """
        frequencies = jnp.array(self.frequencies, jnp.float32)[None, None] * slower
        angles = places.astype(jnp.float32)[:, :, None] * frequencies
        return Turn(jnp.cos(angles) * self.magnitude, jnp.sin(angles) * self.magnitude, self.interleaved)


@dataclass(frozen=True)
class Turn:
    """The cosines and sines of tokens' places, [B or 1, T, R / 2]."""

    cos: Float[Array, "_ T R"]
    sin: Float[Array, "_ T R"]
    interleaved: bool = False

    def __call__(self, x: Float[Array, "B T ND"], num_heads: int) -> Float[Array, "B T ND"]:
        """Turn each head's first R features by the angle of its place; the features behind them stay."""
        heads = x.reshape(*x.shape[:2], num_heads, -1)
        half = self.cos.shape[-1]
        turned, rest = heads[..., : 2 * half], heads[..., 2 * half :]
        cos, sin = self.cos[:, :, None, :], self.sin[:, :, None, :]
        if self.interleaved:
            a, b = turned[..., 0::2], turned[..., 1::2]
        else:
            a, b = turned[..., :half], turned[..., half:]
        parts = (a * cos - b * sin, b * cos + a * sin)
        joined = jnp.stack(parts, axis=-1).reshape(turned.shape) if self.interleaved else jnp.concatenate(parts, -1)
        return jnp.concatenate([joined, rest], axis=-1).reshape(x.shape)


def read_rotary(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    default_theta: float = 10_000.0,
    layer_type: str | None = None,
    interleaved: bool = False,
) -> Rotary:
    """Read `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (before).

    Args:
        config: config.json.
        head_dim: H.
        default_theta: where the file gives none.
        layer_type: which of several, where `rope_parameters` has one for each kind of layer. Several without it raise.
        interleaved: see `Rotary`.

    Raises:
        UnsupportedModelError: a kind that is not implemented, or one without what it needs.
    """
    # In transformers' order: an old file's field wins over the new one.
    given = {**(config.get("rope_scaling") or config.get("rope_parameters") or {})}
    nested = [name for name, value in given.items() if isinstance(value, Mapping)]
    if nested:
        if layer_type not in nested:
            raise UnsupportedModelError(
                f"rope_parameters are of {', '.join(nested)}; "
                + (f"{layer_type!r} is missing" if layer_type else "supported: one kind")
            )
        given = {**given[layer_type]}
    if config.get("original_max_position_embeddings") is not None:
        given["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    kind = given.get("rope_type") or given.get("type") or "default"
    theta = float(given.get("rope_theta") or config.get("rope_theta") or default_theta)
    share = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    width = int(head_dim * (1.0 if share is None else float(share)))
    # In torch's order and precision: at places in the thousands a last bit of a frequency is seen.
    plain = np.float32(1) / np.float32(theta) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    magnitude = 1.0
    try:
        if kind == "default":
            frequencies = plain
        elif kind == "linear":
            frequencies = plain / float(given["factor"])
        elif kind == "dynamic":
            # Its frequencies change only for inputs longer than the model's positions, which are refused here.
            frequencies = plain
        elif kind == "llama3":
            frequencies = llama3(plain, given)
        elif kind == "yarn":
            frequencies, magnitude = yarn(plain, theta, width, given, config)
        else:
            raise UnsupportedModelError(f"rope_type is {kind!r}; supported: default, linear, dynamic, llama3, yarn")
    except KeyError as error:
        raise UnsupportedModelError(f"rope_type is {kind!r}, but {error} is missing") from None
    return Rotary(tuple(map(float, frequencies.astype(np.float32))), magnitude, interleaved)


def llama3(plain: npt.NDArray[np.float32], given: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """Long waves slowed by `factor`, short ones kept, those between blended (Llama 3.1)."""
    factor, low, high = (float(given[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(given["original_max_position_embeddings"])
    waves = 2 * math.pi / plain
    blend = (original / waves - low) / (high - low)
    between = (1 - blend) * plain / factor + blend * plain
    slowed = np.where(waves > original / low, plain / factor, between)
    return np.asarray(np.where(waves < original / high, plain, slowed), np.float32)


def yarn(
    plain: npt.NDArray[np.float32], theta: float, width: int, given: Mapping[str, Any], config: Mapping[str, Any]
) -> tuple[npt.NDArray[np.float32], float]:
    """Frequencies and magnitude of https://arxiv.org/abs/2309.00071."""
    factor = float(given["factor"])
    original = given.get("original_max_position_embeddings") or config["max_position_embeddings"]

    def magnitude_of(scale: float | int, weight: float | int = 1.0) -> float:
        return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0

    def pair_of(rotations: float | int) -> float:
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(given.get("beta_fast") or 32), pair_of(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    ramp = np.clip((np.arange(width // 2, dtype=np.float32) - first) / max(last - first, 0.001), 0, 1)
    frequencies = plain / factor * ramp + plain * (1 - ramp)
    given_magnitude = given.get("attention_factor")
    if given_magnitude is None:
        some, every = given.get("mscale"), given.get("mscale_all_dim")
        if some and every:
            given_magnitude = magnitude_of(factor, some) / magnitude_of(factor, every)
        else:
            given_magnitude = magnitude_of(factor)
    return np.asarray(frequencies, np.float32), float(given_magnitude)
