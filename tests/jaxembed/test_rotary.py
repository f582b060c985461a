"""Rotary frequencies and turning against transformers, for every kind that is implemented."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from jaxembed.errors import UnsupportedModelError
from jaxembed.rotary import read_rotary

LENGTH, HEADS, WIDTH = 6000, 2, 16

KINDS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 10_000.0},
    {"rope_type": "default", "rope_theta": 1_000_000.0},
    {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    },
    {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1500},
    {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1500,
        "beta_fast": 20,
        "beta_slow": 2,
        "mscale": 1.2,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind['rope_type']}-{len(kind)}")
def test_as_transformers_turns(kind: dict[str, Any]) -> None:
    """At places from 0 to the thousands; an old file's two fields mean the same as the new file's one."""
    config = LlamaConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        head_dim=WIDTH,
        max_position_embeddings=LENGTH,
        rope_parameters=dict(kind),
    )
    x = np.random.default_rng(0).normal(size=(1, LENGTH, HEADS * WIDTH)).astype(np.float32)
    heads = torch.from_numpy(x).reshape(1, LENGTH, HEADS, WIDTH).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(config)(heads, torch.arange(LENGTH)[None])
    want = apply_rotary_pos_emb(heads, heads, cos, sin)[0].transpose(1, 2).reshape(x.shape).numpy()
    old = {name: value for name, value in kind.items() if name != "rope_theta"}
    for written in (
        {"rope_parameters": kind},
        {"rope_theta": kind["rope_theta"], "rope_scaling": old | {"type": old["rope_type"]}},
    ):
        rotary = read_rotary(written, WIDTH)
        got = jax.jit(lambda x, rotary=rotary: rotary.turn(jnp.arange(LENGTH)[None])(x, HEADS))(x)
        np.testing.assert_allclose(got[:, :64], want[:, :64], atol=1e-5)
        # An angle in the thousands is a float32 whose last bit is worth 5e-4 of a radian.
        np.testing.assert_allclose(got, want, atol=2e-3)


def test_neighbouring_pairs_and_features_that_stay() -> None:
    """`interleaved` turns (0, 1), (2, 3), ...; `partial_rotary_factor` leaves the features behind it alone."""
    rotary = read_rotary({"partial_rotary_factor": 0.5}, 8, interleaved=True)
    x = np.random.default_rng(1).normal(size=(1, 5, 8)).astype(np.float32)
    got = np.asarray(rotary.turn(jnp.arange(5)[None])(jnp.asarray(x), 1))
    np.testing.assert_array_equal(got[..., 4:], x[..., 4:])
    pairs = x[0, :, :4].reshape(5, 2, 2)
    angles = np.arange(5)[:, None] * np.array(rotary.frequencies)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
    np.testing.assert_allclose(got[0, :, :4].reshape(5, 2, 2)[..., 0], turned.real, atol=1e-6)
    np.testing.assert_allclose(got[0, :, :4].reshape(5, 2, 2)[..., 1], turned.imag, atol=1e-6)


def test_another_kind_is_refused() -> None:
    """By its name; and a known kind that lacks what it needs, by what it lacks."""
    with pytest.raises(UnsupportedModelError, match="'spiral'"):
        read_rotary({"rope_scaling": {"type": "spiral"}}, 8)
    with pytest.raises(UnsupportedModelError, match="'factor' is missing"):
        read_rotary({"rope_scaling": {"type": "linear"}}, 8)
