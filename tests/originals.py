"""Checkpoints as the hub has them from before transformers' own port, or without one; and token types, for these.

Their code is not to be had here: what stands for it is a small torch module of the test's own, or transformers' port
with its weights under the original's names.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from parity import TOLERANCE, small_tokenizer
from safetensors.torch import save_file

from jaxembed.loading import load
from jaxembed.sharding import make_mesh
from jaxembed.tokens import Tokens

__all__ = ["check_token_types", "encoded", "saver"]

State = Mapping[str, torch.Tensor]


def saver(config: Mapping[str, Any], names: Callable[[State], State] = dict) -> Callable[[Any, Path], Path]:
    """For `check_parity(save=...)`: writes a torch module with this config.json, its weights as `names` says."""

    def save(model: torch.nn.Module, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dict(config)))
        arrays = {name: array.contiguous().clone() for name, array in names(model.state_dict()).items()}
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        small_tokenizer().save_pretrained(folder)
        return folder

    return save


def encoded(states: list[torch.Tensor]) -> SimpleNamespace:
    """What a reference returns: as transformers' output, as far as `check_parity` looks."""
    return SimpleNamespace(hidden_states=tuple(states), last_hidden_state=states[-1])


def check_token_types(model: torch.nn.Module, folder: Path, save: Callable[[Any, Path], Path], types: int = 2) -> None:
    """Hidden states agree where the tokens are of several types, in rows of all lengths."""
    ours = load(save(model, folder), mesh=make_mesh(jax.devices()[:1]))
    random = np.random.default_rng(1)
    ids = random.integers(0, ours.config.vocab_size, (4, 8), np.int32)
    kinds = random.integers(0, types, (4, 8), np.int32)
    mask = np.arange(8)[None, :] < np.array([8, 1, 5, 7])[:, None]
    tokens = Tokens.plain(jnp.array(ids), jnp.array(mask))._replace(token_types=jnp.array(kinds))
    got = np.asarray(ours.encoder(ours.leaves).hidden_states(tokens)[-1])
    with torch.no_grad():
        want = model(
            input_ids=torch.from_numpy(ids.astype(np.int64)),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            token_type_ids=torch.from_numpy(kinds.astype(np.int64)),
        ).last_hidden_state.numpy()
    assert np.abs(got - want)[mask].max() <= TOLERANCE
