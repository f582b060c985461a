"""BGE-M3's other two outputs (https://arxiv.org/abs/2402.03216): a weight for each token, and a vector for each.

Two linear layers on the encoder's last hidden state, beside the chain that makes the text's vector. Their weights stand
in files of their own beside the model's. Formulas are those of FlagEmbedding's BGEM3FlagModel.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxembed.architecture import Names, Weight
from jaxembed.errors import CorruptCheckpointError
from jaxembed.layers import Linear
from jaxembed.tensors import Tensors
from jaxembed.types import Output

__all__ = ["FILES", "LEFT_OUT", "NAMES", "build_branch", "conversion", "lexical"]

FILES: Mapping[Output, str] = {Output.SPARSE: "sparse_linear", Output.TOKENS: "colbert_linear"}
"""Output -> its layer's file, without the ending."""

NAMES = Names(weights={"kernel": Weight("weight"), "bias": Weight("bias")})

LEFT_OUT = ("cls_token", "eos_token", "pad_token", "unk_token")
"""Special tokens, by transformers' names, that get no weight."""


def conversion(folder: Path, output: Output) -> str | None:
    """How to convert the layer of an output, where it stands in a folder as a pickle alone; None where it does not."""
    name = FILES.get(output)
    if name is None or not (folder / f"{name}.pt").is_file() or (folder / f"{name}.safetensors").is_file():
        return None
    return (
        f"{folder} holds {name} only as {name}.pt, a pickle, which may run code when loaded. Convert it once, where "
        f"you trust it: safetensors.torch.save_file(torch.load('{name}.pt', weights_only=True), '{name}.safetensors')"
    )


def build_branch(output: Output, file: Path, width: int, dtype: str) -> Linear:
    """The layer of an output.

    Args:
        output: `Output.SPARSE` or `Output.TOKENS`.
        file: its weights, `weight` and `bias`.
        width: D.
        dtype: of the matrix.

    Raises:
        CorruptCheckpointError: the file holds no matrix `weight`.
    """
    weight = Tensors(file).get("weight")
    if weight is None or weight.ndim != 2:
        raise CorruptCheckpointError(f"{file} holds no matrix 'weight'")
    size = 1 if output is Output.SPARSE else weight.shape[0]
    return Linear((width, size), ("embed", "embed"), dtype)


def lexical(
    weights: Float[Array, "B T"],
    input_ids: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    vocab_size: int,
    left_out: Sequence[int],
) -> Float[Array, "B V"]:
    """One weight for each entry of the vocabulary: relu of its tokens', the largest where it stands several times.

    Args:
        weights: of the tokens.
        input_ids: which entry each token is.
        mask: tokens that are not padding.
        vocab_size: V.
        left_out: entries without a weight.
    """
    counted = mask & jnp.all(input_ids[:, :, None] != jnp.array(left_out, input_ids.dtype)[None, None, :], axis=-1)
    kept = jnp.where(counted, jnp.maximum(weights, 0.0), 0.0)

    def row(ids: Int[Array, " T"], values: Float[Array, " T"]) -> Float[Array, " V"]:
        return jnp.zeros((vocab_size,), values.dtype).at[ids].max(values)

    return jax.vmap(row)(input_ids, kept)
