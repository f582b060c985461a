"""Jina Embeddings 2 against a torch module of our own: transformers has no port, and remote code is not to be had here.

What the remote code computes was taken from public descriptions of it that agree with one another.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from originals import check_token_types, encoded, saver
from parity import SIZES, TINY, randomise
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertModel

from jaxembed.errors import UnsupportedModelError, WeightsError
from jaxembed.loading import load
from jaxembed.models import architecture
from jaxembed.models.jina_bert_v2 import ARCHITECTURE, Config, slopes

ORIGINAL: dict[str, Any] = SIZES | {
    "architectures": ["JinaBertForMaskedLM"],
    "auto_map": {"AutoModel": "jinaai/jina-bert-implementation--modeling_bert.JinaBertModel"},
    "emb_pooler": "mean",
    "feed_forward_type": "geglu",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "model_type": "bert",
    "position_embedding_type": "alibi",
    "type_vocab_size": 2,
}
"""config.json of a hub original, in small."""

QK_NORM = {"auto_map": {"AutoModel": "jinaai/jina-bert-v2-qk-post-norm--modeling_bert.JinaBertModel"}}

ACTIVATIONS = {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}


def slope(head: int, heads: int) -> float:
    """The paper's: a power of two of heads has a geometric series; of another number, the rest comes of the double."""
    if math.log2(heads).is_integer():
        return 2.0 ** (-8 * (head + 1) / heads)
    below = 2 ** int(math.log2(heads))
    return slope(head, below) if head < below else slope(2 * (head - below), 2 * below)


class OriginalJinaBert(nn.Module):
    """What the remote code computes, under its names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)  # torch begins biases at random; `randomise` adds to them
        self.told = SimpleNamespace(**config)
        self.more_norms = "qk-post-norm" in config["auto_map"]["AutoModel"]
        told, width = self.told, self.told.hidden_size
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(told.vocab_size, width)
        self.embeddings.token_type_embeddings = nn.Embedding(told.type_vocab_size, width)
        self.embeddings.LayerNorm = self.norm()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList([self.layer() for _ in range(told.num_hidden_layers)])

    def norm(self) -> nn.LayerNorm:
        """One of the norms."""
        return nn.LayerNorm(self.told.hidden_size, eps=self.told.layer_norm_eps)

    def layer(self) -> nn.Module:
        """The parameters of a layer."""
        width, inner = self.told.hidden_size, self.told.intermediate_size
        layer = nn.ModuleDict({"attention": nn.ModuleDict({"self": nn.Module(), "output": nn.Module()})})
        inside, output = layer["attention"]["self"], layer["attention"]["output"]
        for name in ("query", "key", "value"):
            setattr(inside, name, nn.Linear(width, width))
        output.dense, output.LayerNorm = nn.Linear(width, width), self.norm()
        if self.told.feed_forward_type == "original":
            layer["intermediate"], layer["output"] = nn.Module(), nn.Module()
            layer["intermediate"].dense = nn.Linear(width, inner)
            layer["output"].dense, layer["output"].LayerNorm = nn.Linear(inner, width), self.norm()
            return layer
        layer["mlp"] = nn.Module()
        if self.more_norms:
            inside.layer_norm_q, inside.layer_norm_k = self.norm(), self.norm()
            layer["layer_norm_1"], layer["layer_norm_2"] = self.norm(), self.norm()
            layer["mlp"].up_gated_layer = nn.Linear(width, 2 * inner, bias=False)
            layer["mlp"].down_layer = nn.Linear(inner, width)
        else:
            layer["mlp"].gated_layers = nn.Linear(width, 2 * inner, bias=False)
            layer["mlp"].wo, layer["mlp"].layernorm = nn.Linear(inner, width), self.norm()
        return layer

    def attend(self, attention: nn.ModuleDict, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """Attention with ALiBi, its residual and its norm."""
        heads, inside, output = self.told.num_attention_heads, attention["self"], attention["output"]
        q, k, v = inside.query(x), inside.key(x), inside.value(x)
        if self.more_norms:
            q, k = inside.layer_norm_q(q), inside.layer_norm_k(k)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
        places = torch.arange(x.shape[1])
        far = torch.stack([slope(n, heads) * (places[:, None] - places).abs() for n in range(heads)])
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 - far
        mixed = scores.masked_fill(~seen[:, None, None], -1e9).softmax(-1) @ v
        return output.LayerNorm(output.dense(mixed.transpose(1, 2).flatten(2)) + x)

    def feed_forward(self, layer: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        """Of three kinds, with its residual and its norm."""
        if self.told.feed_forward_type == "original":
            inner = ACTIVATIONS[self.told.hidden_act](layer["intermediate"].dense(x))
            return layer["output"].LayerNorm(layer["output"].dense(inner) + x)
        act, mlp = {"geglu": functional.gelu, "reglu": functional.relu}[self.told.feed_forward_type], layer["mlp"]
        if self.more_norms:
            up, gate = mlp.up_gated_layer(x).chunk(2, -1)
            return layer["layer_norm_2"](mlp.down_layer(up * act(gate)) + x)
        gate, up = mlp.gated_layers(x).chunk(2, -1)
        return mlp.layernorm(mlp.wo(act(gate) * up) + x)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        output_hidden_states: bool = True,
    ) -> SimpleNamespace:
        """The embeddings' output and each layer's."""
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        embeddings = self.embeddings
        words = embeddings.word_embeddings(input_ids) + embeddings.token_type_embeddings(types)
        states = [embeddings.LayerNorm(words)]
        for layer in self.encoder.layer:
            x = self.attend(layer["attention"], states[-1], attention_mask.bool())
            if self.more_norms:
                x = layer["layer_norm_1"](states[-1] + x)
            states.append(self.feed_forward(layer, x))
        return encoded(states)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"feed_forward_type": "reglu", "num_attention_heads": 4, "type_vocab_size": 1},
        {"feed_forward_type": "original", "hidden_size": 36, "num_attention_heads": 3},
        {"feed_forward_type": "original", "hidden_act": "silu", "intermediate_size": 7},
        {"hidden_size": 48, "num_attention_heads": 12, "layer_norm_eps": 1e-2},
        {"num_attention_heads": 8, "num_hidden_layers": 4, "max_position_embeddings": 9, "vocab_size": 101},
        QK_NORM,
        QK_NORM | {"feed_forward_type": "reglu", "hidden_size": 36, "num_attention_heads": 6, "intermediate_size": 7},
    ],
)
def test_parity(overrides: dict[str, Any], parity: Callable[..., None]) -> None:
    """Every hidden state and the pooled vector agree with torch, for every kind of layer."""
    config = ORIGINAL | overrides
    parity(OriginalJinaBert(config), save=saver(config))


def test_the_reference_is_bert_without_alibi(monkeypatch: pytest.MonkeyPatch) -> None:
    """With slopes of zero and BERT's feed-forward the module that stands for the remote code is BERT, less places."""
    monkeypatch.setitem(globals(), "slope", lambda head, heads: 0.0)
    bert = randomise(BertModel(BertConfig(**TINY), add_pooling_layer=False), 0)
    bert.embeddings.position_embeddings.weight.data.zero_()
    state = {name: array for name, array in bert.state_dict().items() if "position" not in name}
    original = OriginalJinaBert(ORIGINAL | {"feed_forward_type": "original"}).eval()
    original.load_state_dict(state)
    ids = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([9, 4, 1])[:, None]).long()
    with torch.no_grad():
        difference = original(ids, mask).last_hidden_state - bert(ids, mask).last_hidden_state
    assert difference[mask.bool()].abs().max() < 1e-5


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_what_is_left_over(prefix: str, parity: Callable[..., None]) -> None:
    """Poolers and heads are not needed, and the prefix of a larger model is found."""

    def names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        more = {f"{prefix}pooler.dense.weight": torch.zeros(16, 16), "cls.predictions.bias": torch.zeros(64)}
        return {prefix + name: array for name, array in state.items()} | more

    parity(OriginalJinaBert(ORIGINAL), save=saver(ORIGINAL, names))


def test_token_types(tmp_path: Path) -> None:
    """The second text of a pair has its own type."""
    check_token_types(randomise(OriginalJinaBert(ORIGINAL), 0), tmp_path, saver(ORIGINAL))


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 14, 16, 25])
def test_slopes(heads: int) -> None:
    """As the paper's recursion has them, for numbers of heads that are no power of two also."""
    assert slopes(heads) == pytest.approx([slope(head, heads) for head in range(heads)], rel=1e-12)


def test_slopes_of_twelve_heads() -> None:
    """Those of jina-embeddings-v2-base, spelled out."""
    powers = [1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5]
    assert slopes(12) == pytest.approx([2**-power for power in powers], rel=1e-12)


def test_code_beside_the_weights(tmp_path: Path) -> None:
    """A copy of the remote code is known by `_name_or_path`; if that says nothing, by what it needs of the weights."""
    here = {"auto_map": {"AutoModel": "modeling_bert.JinaBertModel"}}
    assert not Config.from_hf(ORIGINAL | here).qk_norm
    assert Config.from_hf(ORIGINAL | here | {"_name_or_path": "jinaai/jina-bert-v2-qk-post-norm"}).qk_norm
    folder = saver(ORIGINAL | here)(randomise(OriginalJinaBert(ORIGINAL | QK_NORM), 0), tmp_path)
    with pytest.raises(WeightsError, match="layer_norm_q"):
        load(folder)


def test_remote_class_is_replaced() -> None:
    """The hub's `auto_map` leads here, though the model_type is BERT's."""
    assert architecture(ORIGINAL) is architecture(ORIGINAL | QK_NORM) is ARCHITECTURE


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'"),
        ({"position_embedding_type": None}, "position_embedding_type is 'absolute'"),
        ({"feed_forward_type": "swiglu"}, "feed_forward_type is 'swiglu'; supported: geglu, reglu, original"),
        (QK_NORM | {"feed_forward_type": "original"}, "feed_forward_type is 'original'; supported with normalised"),
        ({"auto_map": {"AutoModel": "a/b--modeling_bert.JinaBertModel"}}, "remote code is of 'a/b'"),
        ({"hidden_act": "gelu_fantasy"}, "activation is 'gelu_fantasy'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 3}, "16 does not divide into 3 heads"),
    ],
)
def test_what_is_not_supported_is_refused(overrides: dict[str, Any], message: str) -> None:
    """A configuration that asks for another computation never loads as if it did not."""
    with pytest.raises(UnsupportedModelError, match=message):
        Config.from_hf(ORIGINAL | overrides)


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
)
def test_missing_field_is_named(field: str) -> None:
    """Sizes have no defaults here: a file without one is refused by name."""
    with pytest.raises(UnsupportedModelError, match=field):
        Config.from_hf({name: value for name, value in ORIGINAL.items() if name != field})
