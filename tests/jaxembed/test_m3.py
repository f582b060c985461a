"""BGE-M3's three outputs against what its paper and FlagEmbedding say that they are."""

import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import load
from parity import SIZES, TOLERANCE, randomise
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from jaxembed import Bucket, Embedder, Ladder
from jaxembed.errors import PickledCheckpointError, UnsupportedModelError

Record = Callable[[str, object], None]


def tokenizer() -> PreTrainedTokenizerFast:
    """Single letters between the special tokens of XLM-RoBERTa."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {piece: i for i, piece in enumerate([*special, *string.ascii_lowercase, "<mask>"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos": "<s>", "cls": "<s>", "eos": "</s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    tokens = {f"{name}_token": token for name, token in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=32, **tokens)


class M3:
    """BGE-M3 in miniature, saved into a folder; and what its paper and FlagEmbedding say that it gives."""

    def __init__(self, folder: Path, *, size: int = 16, pickled: bool = False) -> None:
        config = XLMRobertaConfig(**SIZES | {"vocab_size": 31, "max_position_embeddings": 34, "pad_token_id": 1})
        self.encoder = randomise(XLMRobertaModel(config, add_pooling_layer=False), 0)
        self.tokenizer = tokenizer()
        torch.manual_seed(0)  # torch begins biases at random; `randomise` adds to them
        self.sparse = randomise(nn.Linear(16, 1), 1)
        self.colbert = randomise(nn.Linear(16, size), 2)
        self.encoder.save_pretrained(folder / "hf")
        self.tokenizer.save_pretrained(folder / "hf")
        chain = [Transformer(str(folder / "hf")), Pooling(16, "cls"), Normalize()]
        self.dense = SentenceTransformer(modules=chain, device="cpu")
        self.dense.save(str(folder), create_model_card=False)
        for name, layer in (("sparse_linear", self.sparse), ("colbert_linear", self.colbert)):
            if pickled:
                torch.save(layer.state_dict(), folder / f"{name}.pt")
            else:
                save_file(layer.state_dict(), folder / f"{name}.safetensors")

    @torch.no_grad()
    def hidden(self, text: str) -> tuple[list[int], torch.Tensor]:
        """Token ids, and their last hidden states."""
        ids = self.tokenizer(text, truncation=True, max_length=32)["input_ids"]
        return ids, self.encoder(torch.tensor([ids])).last_hidden_state[0]

    @torch.no_grad()
    def lexical(self, text: str) -> np.ndarray:
        """One weight for each entry of the vocabulary: the largest of its tokens', and none for special ones."""
        ids, hidden = self.hidden(text)
        weights = np.zeros(31, np.float32)
        for token, weight in zip(ids, self.sparse(hidden)[:, 0].tolist(), strict=True):
            if token not in (0, 1, 2, 3):
                weights[token] = max(weights[token], weight)
        return weights

    @torch.no_grad()
    def vectors(self, text: str) -> np.ndarray:
        """One unit vector for each token but the first."""
        made = self.colbert(self.hidden(text)[1][1:])
        return (made / made.norm(dim=1, keepdim=True)).numpy()


TEXTS = ["a b c", "", "a a a b a", "x unknown y", "<mask> z <s>", "q w e r t y " * 10, "unknown"]


@pytest.mark.parametrize("size", [16, 6])
def test_the_three_outputs(size: int, tmp_path: Path, record_property: Record) -> None:
    """Dense, sparse and multi-vector, of one folder; with repeated, unknown and special tokens in the texts."""
    theirs, ours = M3(tmp_path, size=size), load(tmp_path)
    worst = {"dense": float(np.abs(ours.encode(TEXTS) - theirs.dense.encode(TEXTS)).max())}
    lexical = np.stack([theirs.lexical(text) for text in TEXTS])
    # Some tokens have a weight and some none, and the one that stands four times has several.
    assert 0 < (lexical[0] > 0).sum() < 3
    assert lexical[2, 4] > 0
    worst["sparse"] = float(np.abs(ours.encode_sparse(TEXTS).toarray() - lexical).max())
    got, want = ours.encode_tokens(TEXTS), [theirs.vectors(text) for text in TEXTS]
    assert [one.shape for one in got] == [one.shape for one in want]
    worst["vectors"] = max(float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True))
    assert max(worst.values()) <= TOLERANCE, worst
    for name, difference in worst.items():
        record_property(name, f"max abs diff {difference:.1e}")
    assert {"sparse_linear.kernel", "sparse_linear.bias", "colbert_linear.kernel"} <= set(ours.params)


def test_over_several_devices(tmp_path: Path) -> None:
    """Rows on eight devices give what they give on one."""
    M3(tmp_path)
    one, many = load(tmp_path), Embedder.from_pretrained(tmp_path, ladder=Ladder([Bucket(8, 32)]))
    np.testing.assert_allclose(
        many.encode_sparse(TEXTS).toarray(), one.encode_sparse(TEXTS).toarray(), rtol=0, atol=1e-6
    )
    for a, b in zip(many.encode_tokens(TEXTS), one.encode_tokens(TEXTS), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)


def test_the_measures(tmp_path: Path) -> None:
    """The mean over the query's vectors of the largest product; the sum of products of common tokens' weights."""
    theirs, ours = M3(tmp_path), load(tmp_path)
    queries, documents = TEXTS[:3], TEXTS[3:]
    got = ours.max_similarity(ours.encode_tokens(queries), ours.encode_tokens(documents))
    want = [
        [(theirs.vectors(a) @ theirs.vectors(b).T).max(axis=1).sum() / len(theirs.vectors(a)) for b in documents]
        for a in queries
    ]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    scores = ours.similarity(ours.encode_sparse(queries), ours.encode_sparse(documents))
    products = [[theirs.lexical(a) @ theirs.lexical(b) for b in documents] for a in queries]
    np.testing.assert_allclose(scores, products, rtol=0, atol=TOLERANCE)


def test_the_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense vectors are there; the others ask for a conversion, and do what it says."""
    theirs, ours = M3(tmp_path, pickled=True), load(tmp_path)
    np.testing.assert_allclose(ours.encode(TEXTS), theirs.dense.encode(TEXTS), rtol=0, atol=TOLERANCE)
    monkeypatch.chdir(tmp_path)
    for method in (ours.encode_tokens, ours.encode_sparse):
        with pytest.raises(PickledCheckpointError, match="may run code") as caught:
            method("a")
        code = str(caught.value).split("trust it: ")[1]
        import safetensors.torch

        eval(code, {"safetensors": safetensors, "torch": torch})
    converted = load(tmp_path)
    np.testing.assert_allclose(converted.encode_tokens("a b"), theirs.vectors("a b"), rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(
        converted.encode_sparse("a b").toarray()[0], theirs.lexical("a b"), rtol=0, atol=TOLERANCE
    )


def test_half(tmp_path: Path) -> None:
    """With one of the layers alone, the other output is a plain model's, which gives no sparse vectors."""
    theirs = M3(tmp_path)
    (tmp_path / "sparse_linear.safetensors").unlink()
    ours = load(tmp_path)
    np.testing.assert_allclose(ours.encode_tokens("a b"), theirs.vectors("a b"), rtol=0, atol=TOLERANCE)
    with pytest.raises(UnsupportedModelError, match="does not give sparse vectors"):
        ours.encode_sparse("a")


@pytest.mark.parametrize(
    ("name", "arrays", "message"),
    [
        ("sparse_linear", {"weight": torch.zeros(2, 16), "bias": torch.zeros(2)}, "misshapen"),
        ("sparse_linear", {"weight": torch.zeros(1, 16)}, "missing"),
        ("colbert_linear", {"bias": torch.zeros(16)}, "no matrix 'weight'"),
        (
            "colbert_linear",
            {"weight": torch.zeros(6, 16), "bias": torch.zeros(6), "more": torch.zeros(1)},
            "unexpected",
        ),
    ],
)
def test_broken_layers(name: str, arrays: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    """As of any other weights."""
    M3(tmp_path)
    save_file(arrays, tmp_path / f"{name}.safetensors")
    with pytest.raises(Exception, match=message):
        load(tmp_path)
