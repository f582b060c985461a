"""The gated feed-forward of newer encoders and of decoders (https://arxiv.org/abs/2002.05202), and the parts of
encoders that are BERT with such a feed-forward and without a table of positions: Nomic's, GTE, Jina's second.

Letters in shapes are those of `layers`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxembed.attention import attention
from jaxembed.layers import LayerNorm, Linear, activation, gated_feed_forward, linear_norm, linears
from jaxembed.lookups import TokenTables, embedded
from jaxembed.rotary import Turn
from jaxembed.tokens import Rows, Tokens

__all__ = ["GatedLayer", "GatedMLP", "WordEmbeddings"]


class GatedMLP(nnx.Module):
    """down(act(gate(x)) * up(x)): "SwiGLU" where the activation is silu, "GEGLU" where it is gelu.

    Args:
        width: D.
        inner: F.
        act: Hugging Face's name of the activation.
        dtype: of the matrices.
        bias: have gate and up one?
        down_bias: has down one? By default as `bias`.
    """

    def __init__(
        self, width: int, inner: int, act: str, dtype: str, *, bias: bool = False, down_bias: bool | None = None
    ) -> None:
        self.gate = Linear((width, inner), ("embed", "mlp"), dtype, bias=bias)
        self.up = Linear((width, inner), ("embed", "mlp"), dtype, bias=bias)
        self.down = Linear((inner, width), ("mlp", "embed"), dtype, bias=bias if down_bias is None else down_bias)
        # A name that is none is an error now, not when a batch is compiled.
        activation(act)
        self.act = act

    def __call__(self, x: Float[Array, "L M D"]) -> Float[Array, "L M D"]:
        return gated_feed_forward(x, self.gate, self.act, self.up, self.down)


class GatedLayer(nnx.Module):
    """Self-attention and a feed-forward, each added to its input and then normalised (post-norm).

    Args:
        width: D.
        num_heads: N.
        mlp: the feed-forward.
        eps: of the norms.
        dtype: of the matrices.
        head_dim: H; by default D / N.
        bias: have the attention's four matrices one?
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp: Callable[[jax.Array], jax.Array],
        eps: float,
        dtype: str,
        *,
        head_dim: int | None = None,
        bias: bool = True,
    ) -> None:
        inner = num_heads * head_dim if head_dim else width
        self.query = Linear((width, inner), ("embed", "heads"), dtype, bias=bias)
        self.key = Linear((width, inner), ("embed", "heads"), dtype, bias=bias)
        self.value = Linear((width, inner), ("embed", "heads"), dtype, bias=bias)
        self.output = Linear((inner, width), ("heads", "embed"), dtype, bias=bias)
        self.attention_norm = LayerNorm(width, eps)
        self.mlp = mlp
        self.output_norm = LayerNorm(width, eps)
        self.num_heads = num_heads
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self,
        x: Float[Array, "L M D"],
        rows: Rows,
        *,
        turn: Turn | None = None,
        bias: Float[Array, "_ N T T"] | None = None,
    ) -> Float[Array, "L M D"]:
        """`turn` is done to queries and keys; `bias` is added to the attention scores."""
        x = self.attend(x, rows, turn, bias)
        return self.output_norm(x + self.mlp(x))

    def attend(
        self,
        x: Float[Array, "L M D"],
        rows: Rows,
        turn: Turn | None,
        bias: Float[Array, "_ N T T"] | None,
    ) -> Float[Array, "L M D"]:
        """x with what attention adds, normalised."""
        query, key, value = linears(x, [self.query, self.key, self.value])
        if turn is not None:
            query, key = turn(query, self.num_heads), turn(key, self.num_heads)
        mixed = attention(query, key, value, rows, num_heads=self.num_heads, dtype=self.dtype, bias=bias)
        return linear_norm(mixed, self.output, x, self.attention_norm)


class WordEmbeddings(TokenTables):
    """Word + token type, normalised; places are told elsewhere.

    Args:
        vocab: V.
        width: D.
        types: token types; 0 for none.
        eps: of the norm.
        dtype: of the tables.
    """

    def __init__(self, vocab: int, width: int, types: int, eps: float, dtype: str) -> None:
        super().__init__(vocab, width, dtype, types=types)
        self.norm = LayerNorm(width, eps)

    def __call__(self, tokens: Tokens) -> Float[Array, "L M D"]:
        return embedded(self.lookups(tokens), self.norm)
