"""Does an architecture compute what its Hugging Face original computes? One helper for every architecture's test.

The tests build a tiny random model in torch, save it as a real checkpoint, load that through the real loader and
compare layer by layer. Knows no architecture but the tiny BERT that other tests borrow.
"""

import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedModel, PreTrainedTokenizerFast

from jaxembed.checkpoint import Checkpoint
from jaxembed.loading import load
from jaxembed.sharding import make_mesh
from jaxembed.tokens import Rows, Tokens
from jaxembed.types import NO_TASK
from jaxembed.types import Pooling as Mean

__all__ = [
    "HEAD",
    "SIZES",
    "TINY",
    "TOLERANCE",
    "WIDE",
    "check_parity",
    "cosines",
    "randomise",
    "save_checkpoint",
    "save_sentence_transformer",
    "small_tokenizer",
    "tiny_bert",
]

TOLERANCE = 1e-5
"""Largest absolute difference of a hidden state or a vector, in float32."""

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}
"""Sizes of a tiny model, under the names that most of Hugging Face's configurations use."""

HEAD = 32
"""Features of a head that every CPU's kernel takes."""

WIDE = TINY | {"hidden_size": 2 * HEAD, "num_attention_heads": 2}
"""`TINY` with such heads."""

SIZES: dict[str, Any] = {name: value for name, value in TINY.items() if name != "attn_implementation"}
"""The same without what is no size, for a configuration that is written or compared as it stands."""

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

torch.set_num_threads(2)


def tiny_bert(seed: int = 0, **overrides: Any) -> BertModel:
    """A random BERT: two layers of width 16; `overrides` go to BertConfig."""
    return randomise(BertModel(BertConfig(**TINY | overrides)), seed)


def randomise(model: Any, seed: int) -> Any:
    """Give every parameter values that matter.

    Hugging Face starts biases at 0, norms at 1 and matrices so small that attention is nearly uniform: a model that
    left one of them out would still agree.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.3 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
    return model.eval()


def small_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of single letters and digits, 57 tokens of text and the BERT kind's 5 special ones."""
    letters = string.ascii_lowercase
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *"01234"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=options.pop("lowercase", True))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, SPECIAL, strict=True)), **options)


def save_checkpoint(hf_model: PreTrainedModel, folder: Path, **tokenizer_options: Any) -> Path:
    """Write a model and the small tokenizer as a Hugging Face folder; returns the folder."""
    hf_model.save_pretrained(folder)
    small_tokenizer(**tokenizer_options).save_pretrained(folder)
    return folder


def save_sentence_transformer(
    hf_model: PreTrainedModel,
    folder: Path,
    *,
    modes: Sequence[str] = ("mean",),
    include_prompt: bool = True,
    normalize: bool = True,
    **options: Any,
) -> SentenceTransformer:
    """Write a model as sentence-transformers itself writes one, into `folder`; returns its model, the reference.

    Args:
        hf_model: the transformer.
        folder: where to; "hf" under it holds the transformer alone.
        modes: of pooling, concatenated.
        include_prompt: of pooling.
        normalize: put a Normalize module at the end?
        options: for SentenceTransformer: prompts, default_prompt_name, similarity_fn_name, truncate_dim.
    """
    transformer = Transformer(str(save_checkpoint(hf_model, folder / "hf")))
    pooling = Pooling(hf_model.config.hidden_size, list(modes), include_prompt=include_prompt)
    chain = [transformer, pooling, *([Normalize()] if normalize else [])]
    model = SentenceTransformer(modules=chain, device="cpu", **options)
    model.save(str(folder), create_model_card=False)
    return model


def cosines(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Cosine of each row of `a` with the same row of `b`, in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return (x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))


def check_parity(
    hf_model: PreTrainedModel,
    folder: Path,
    *,
    seed: int = 0,
    save: Callable[[PreTrainedModel, Path], Path] = save_checkpoint,
    **call: Any,
) -> float:
    """Save a Hugging Face model, load it with `jaxembed.loading.load`, and compare.

    Every hidden state (the embeddings' output and each layer's) and the mean-pooled vector must agree to
    `TOLERANCE` at every real token of rows of all kinds: of the greatest length, short, and one token only; padded, and
    flat.

    Args:
        hf_model: random; see `randomise`.
        folder: an empty folder to save it in.
        seed: of the token ids.
        save: writes the model and a tokenizer into the folder; another one writes the names of a hub original.
        call: more arguments for the original's forward.

    Returns:
        The largest absolute difference, for the record.
    """
    # A decoder's folder would get the last token: what is pooled is not the question here.
    checkpoint = replace(Checkpoint.open(save(hf_model, folder)), modules=(Mean(),))
    model = load(checkpoint, mesh=make_mesh(jax.devices()[:1]))
    length = model.max_length
    lengths = np.array([length, 1, 2, length // 2, length - 1, length, 0], np.int32)
    random = np.random.default_rng(seed)
    ids = random.integers(0, model.config.vocab_size, (len(lengths), length), np.int32)
    mask = np.arange(length)[None, :] < lengths[:, None]
    # As in pairs of texts, where the original knows two types.
    paired = getattr(getattr(hf_model, "config", None), "type_vocab_size", 0) > 1
    types = random.integers(0, 2 if paired else 1, ids.shape, np.int32)

    @jax.jit
    def ours(leaves: Any, tokens: Tokens) -> Any:
        hidden = [tokens.rows.apart(state) for state in model.encoder(leaves).hidden_states(tokens)]
        none = jnp.zeros(len(lengths), jnp.int32)
        return hidden, model.embed(leaves, tokens, none, none + model.dimension, none.astype(bool))

    padded = Tokens.plain(jnp.asarray(ids), jnp.asarray(mask))._replace(token_types=jnp.asarray(types))
    real = lengths > 0
    # Our padding holds random ids and torch's the padding token: what stands there must not matter.
    torch_ids = torch.from_numpy(np.where(mask, ids, 0)[real].astype(np.int64))
    torch_mask = torch.from_numpy(mask[real].astype(np.int64))
    if paired:
        call = {"token_type_ids": torch.from_numpy(types[real].astype(np.int64)), **call}
    with torch.no_grad():
        output = hf_model(input_ids=torch_ids, attention_mask=torch_mask, output_hidden_states=True, **call)
        pooled = Pooling(output.last_hidden_state.shape[-1], "mean")(
            {"token_embeddings": output.last_hidden_state, "attention_mask": torch_mask}
        )["sentence_embedding"]

    worst = 0.0
    for kind, tokens in (("padded", padded), ("flat", in_line(ids, types, lengths))):
        states, vectors = ours(model.leaves, tokens)
        assert len(states) == len(output.hidden_states)
        for layer, (got, want) in enumerate(zip(states, output.hidden_states, strict=True)):
            got = np.asarray(got)
            assert np.isfinite(got).all(), f"hidden state {layer} is not finite, {kind}"
            difference = float(np.abs(got[real] - want.numpy())[mask[real]].max())
            assert difference <= TOLERANCE, f"hidden state {layer} differs by {difference:.1e}, {kind}"
            worst = max(worst, difference)
        difference = float(np.abs(np.asarray(vectors)[real] - pooled.numpy()).max())
        assert difference <= TOLERANCE, f"the pooled vector differs by {difference:.1e}, {kind}"
        worst = max(worst, difference)
    return worst


def in_line(
    ids: npt.NDArray[np.int32], types: npt.NDArray[np.int32], lengths: npt.NDArray[np.int32], *, spare: int = 3
) -> Tokens:
    """Padded rows, flat: one behind another, and a few tokens of padding.

    Args:
        ids: [B, T].
        types: [B, T], of the tokens.
        lengths: [B], tokens of each row that are not padding.
        spare: tokens of padding, which are copies of the first one.
    """
    rows, places = np.nonzero(np.arange(ids.shape[1])[None, :] < lengths[:, None])
    rows, places = (np.concatenate([found, np.zeros(spare, np.int64)]) for found in (rows, places))
    told = jnp.asarray(lengths)
    return Tokens(
        input_ids=jnp.asarray(ids[rows, places])[None],
        token_types=jnp.asarray(types[rows, places])[None],
        tasks=jnp.full(len(lengths), NO_TASK, jnp.int32),
        rows=Rows.in_line(told, told, tokens=len(rows), length=ids.shape[1]),
    )
