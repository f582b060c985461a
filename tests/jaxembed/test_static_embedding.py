"""Static embeddings: tables that sentence-transformers and model2vec write, against sentence-transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import TEXTS, compare, load, old_modules, reload, save, write
from parity import cosines, randomise, small_tokenizer
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, StaticEmbedding
from tokenizers import Tokenizer
from tokenizers import models as kinds

from jaxembed.errors import (
    CorruptCheckpointError,
    PickledCheckpointError,
    TokenIdError,
    UnsupportedModelError,
    WeightsError,
)

Record = Callable[[str, object], None]

WIDTH = 24
LONG = "x y z a b c d " * 100 + "0 1 2 3 " * 200
"""1,500 tokens of the small tokenizer."""
UNKNOWN = "a θ b 9"
"""Two of its tokens are unknown."""


def backend(cut: int | None = None, direction: str = "right") -> Tokenizer:
    """A tokenizer of single letters, which adds special tokens unless told not to, and may cut texts."""
    made = small_tokenizer().backend_tokenizer
    if cut is not None:
        made.enable_truncation(cut, direction=direction)
    return made


ROWS = backend().get_vocab_size()


def table(cut: int | None = None, direction: str = "right") -> StaticEmbedding:
    """A random table of it."""
    return randomise(StaticEmbedding(backend(cut, direction), embedding_dim=WIDTH), 7)


def longest(folder: Path, length: int = 2048, **options: Any) -> Any:
    """Ours, with room for the long text."""
    return load(folder, length=length, **options)


@pytest.mark.parametrize("behind", ["nothing", "Normalize", "Dense", "Dense and Normalize"])
def test_saved_by_sentence_transformers(behind: str, tmp_path: Path, record_property: Record) -> None:
    """Its own form, with what may stand behind it: empty texts, long ones, and special tokens written out."""
    dense = randomise(Dense(WIDTH, 8, bias=False), 1)
    chain = {"nothing": [], "Normalize": [Normalize()], "Dense": [dense], "Dense and Normalize": [dense, Normalize()]}
    save(tmp_path, [table(), *chain[behind]], prompts={"query": "a b c "})
    assert not (tmp_path / "config.json").exists()
    ours, theirs = longest(tmp_path), reload(tmp_path)
    assert ours.dimension == (8 if "Dense" in behind else WIDTH)
    assert ours.max_length == 2048
    texts = [*TEXTS, UNKNOWN, LONG]
    least = min(compare(ours, theirs, texts), compare(ours, theirs, texts, prompt_name="query"))
    record_property("1 - min cosine", f"{1 - least:.1e}")
    assert not ours.encode("").any()
    assert len(ours.tokenizer.encode_texts([LONG])[0]) == 1500


def test_there_is_no_limit(tmp_path: Path) -> None:
    """Without a ladder of the caller's a text may have 8,192 tokens."""
    from jaxembed import Embedder

    save(tmp_path, [table()])
    ours = Embedder.from_pretrained(tmp_path, max_batch_tokens=256)
    assert ours.max_length == 8192
    assert ours.model.config.max_length is None
    assert Embedder.from_pretrained(tmp_path, max_length=20_000).max_length == 20_000
    compare(ours, reload(tmp_path), ["a b c", LONG])


@pytest.mark.parametrize("direction", ["right", "left"])
def test_a_cut_that_the_tokenizer_asks_for(direction: str, tmp_path: Path) -> None:
    """tokenizer.json may say how many tokens count, and of which end: sentence-transformers obeys."""
    save(tmp_path, [table(10, direction)])
    ours = longest(tmp_path)
    assert ours.max_length == 10
    compare(ours, reload(tmp_path), [*TEXTS, LONG])
    assert cosines(ours.encode([LONG]), longest(save(tmp_path / "all", [table()])).encode([LONG]))[0] < 0.999


def arrays(dtype: Any, mapped: bool, weighted: bool) -> dict[str, np.ndarray]:
    """What model2vec writes: vectors, for each token its vector's row, and for each token a weight."""
    random = np.random.default_rng(3)
    rows = 20 if mapped else ROWS
    found = {"embeddings": random.normal(size=(rows, WIDTH)).astype(dtype)}
    if mapped:
        found["mapping"] = random.integers(0, rows, ROWS)
    if weighted:
        found["weights"] = random.uniform(0.1, 2, ROWS).astype(np.float64 if mapped else np.float32)
    return found


def model2vec(folder: Path, tensors: dict[str, np.ndarray], *, modules: bool = True, **config: Any) -> Path:
    """A folder as model2vec writes one."""
    kinds = ("StaticEmbedding", "Normalize") if config.get("normalize") else ("StaticEmbedding",)
    listed = old_modules(*kinds)
    listed[0]["path"] = "."
    write(folder, {"config.json": {"model_type": "model2vec", "architectures": ["StaticModel"], **config}})
    if modules:
        write(folder, {"modules.json": listed})
    save_file(tensors, folder / "model.safetensors")
    backend(config.get("cut")).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("mapped", [False, True], ids=["", "mapping"])
@pytest.mark.parametrize("normalize", [False, True], ids=["", "normalize"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_model2vec(
    dtype: str, normalize: bool, mapped: bool, weighted: bool, tmp_path: Path, record_property: Record
) -> None:
    """Its form of the arrays, with its modules.json; float16 is computed in float32."""
    model2vec(tmp_path, arrays(dtype, mapped, weighted), normalize=normalize)
    ours, theirs = longest(tmp_path), reload(tmp_path)
    assert ours.model.checkpoint.normalize == normalize
    least = compare(ours, theirs, [*TEXTS, UNKNOWN, LONG])
    record_property("1 - min cosine", f"{1 - least:.1e}")


def by_hand(tensors: dict[str, np.ndarray], texts: list[str], *, length: int | None, normalize: bool) -> np.ndarray:
    """model2vec's own formula: the mean over the tokens that are known, of the first `length` ones."""
    rows = []
    for encoding in backend().encode_batch(texts, add_special_tokens=False):
        ids = [one for one in encoding.ids[:length] if one != 1]
        vectors = tensors["embeddings"][tensors["mapping"][ids]] * tensors["weights"][ids][:, None]
        rows.append(vectors.mean(axis=0) if ids else np.zeros(WIDTH))
    found = np.stack(rows)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12) if normalize else found


@pytest.mark.parametrize("config", [{}, {"normalize": True}, {"max_length": 40}, {"max_length": None}], ids=str)
def test_model2vec_without_modules(config: dict[str, Any], tmp_path: Path) -> None:
    """A folder that model2vec alone reads: unknown tokens do not count, nor does what is behind 512 tokens or so."""
    tensors = arrays("float32", mapped=True, weighted=True)
    model2vec(tmp_path, tensors, modules=False, **config)
    ours = longest(tmp_path)
    length = config.get("max_length", 512)
    assert ours.max_length == (length or 2048)
    texts = [*TEXTS, UNKNOWN, "θ 9", LONG]
    want = by_hand(tensors, texts, length=length, normalize="normalize" in config)
    np.testing.assert_allclose(ours.encode(texts), want, rtol=0, atol=1e-5)
    assert not ours.encode("θ 9").any()
    assert ours.encode(backend().encode("θ 9", add_special_tokens=False).ids).any()


@pytest.mark.parametrize("unknown", [kinds.WordPiece, kinds.BPE, kinds.WordLevel, kinds.Unigram])
def test_the_unknown_token_of_every_kind_of_tokenizer(unknown: Any, tmp_path: Path) -> None:
    """Where model2vec looks for it."""
    words = {"a": 0, "[UNK]": 1, "b": 2}
    if unknown is kinds.Unigram:
        model = kinds.Unigram([(word, -1.0) for word in words], unk_id=1)
    elif unknown is kinds.BPE:
        model = kinds.BPE(words, [], unk_token="[UNK]")
    else:
        model = unknown(words, unk_token="[UNK]")
    tensors = {"embeddings": np.array([[1, 0], [0, 1], [3, 0]], np.float32)}
    model2vec(tmp_path, tensors, modules=False)
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(load(tmp_path).encode(["a", "θ", "b"]), [[1, 0], [0, 0], [3, 0]])


def test_the_table_in_bfloat16(tmp_path: Path) -> None:
    """The table and nothing else: the weights of tokens stay exact."""
    model2vec(tmp_path, arrays("float32", mapped=True, weighted=True))
    ours, exact = longest(tmp_path, dtype="bfloat16"), longest(tmp_path)
    dtypes = {path: str(array.dtype) for path, array in ours.params.items()}
    assert dtypes == {"embedding.table": "bfloat16", "mapping": "int32", "weights": "float32"}
    texts = [text for text in TEXTS if text]
    assert cosines(ours.encode(texts), exact.encode(texts)).min() > 0.999


def test_dimensions_are_cut(tmp_path: Path) -> None:
    """The tables are trained for it."""
    save(tmp_path, [table(), Normalize()])
    got = load(tmp_path).encode(TEXTS[:1], dimensions=5)
    want = reload(tmp_path).encode(TEXTS[:1], truncate_dim=5, normalize_embeddings=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda a: a.pop("embeddings"),
            CorruptCheckpointError,
            "holds no table of vectors: neither 'embedding.weight'",
        ),
        (lambda a: a.update(embeddings=a["embeddings"][0]), CorruptCheckpointError, "holds no table of vectors"),
        (lambda a: a["mapping"].__setitem__(5, 20), CorruptCheckpointError, "'mapping' must be .* 0 to 19"),
        (lambda a: a["mapping"].__setitem__(5, -1), CorruptCheckpointError, "'mapping' must be .* 0 to 19"),
        (lambda a: a.update(mapping=a["mapping"][None]), CorruptCheckpointError, "'mapping' must be a list of rows"),
        (
            lambda a: a.update(weights=a["weights"][:9]),
            WeightsError,
            r"misshapen \(1\):\s+weights has the shape \(9,\)",
        ),
        (lambda a: a.update(other=a["weights"]), WeightsError, r"unexpected \(1\):\s+other"),
        (
            lambda a: a.update(embeddings=np.ones((20, WIDTH), np.int8)),
            WeightsError,
            "embeddings holds int8, as a quantised model does",
        ),
        (lambda a: a["embeddings"].__setitem__((0, 0), np.nan), WeightsError, "embeddings holds NaN or Inf"),
    ],
)
def test_broken_arrays(change: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    """Refused, with what is wrong."""
    tensors = arrays("float32", mapped=True, weighted=True)
    change(tensors)
    model2vec(tmp_path, tensors)
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_a_token_without_a_vector(tmp_path: Path) -> None:
    """The tokenizer has more tokens than the table rows: an error names the text that has one, as torch's would not."""
    save(tmp_path, [StaticEmbedding(backend(), embedding_weights=np.ones((ROWS - 1, 4), np.float32))])
    ours = load(tmp_path)
    last = backend().id_to_token(ROWS - 1)
    with pytest.raises(TokenIdError, match=rf"input\[1\]\[1\] is the token id {ROWS - 1}, .* 0 to {ROWS - 2}"):
        ours.encode(["a b", f"a {last}"])
    with pytest.raises(RuntimeError):
        SentenceTransformer(str(tmp_path), device="cpu").encode([f"a {last}"])


def test_what_cannot_stand_behind_a_table(tmp_path: Path) -> None:
    """It gives one vector a text already."""
    listed = old_modules("StaticEmbedding", "Pooling")
    save(tmp_path, [table()])
    write(tmp_path, {"modules.json": listed, "1_Pooling/config.json": {"pooling_mode": "mean"}})
    with pytest.raises(UnsupportedModelError, match=r"'Pooling' .* cannot stand behind Pooling"):
        load(tmp_path)


def test_a_table_without_its_files(tmp_path: Path) -> None:
    """No tokenizer, a broken one, or a pickle in place of the table."""
    save(tmp_path, [table()])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(CorruptCheckpointError, match="cannot load a tokenizer from"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CorruptCheckpointError, match="cannot load a tokenizer from"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"embedding.weight": torch.ones(ROWS, 4)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(PickledCheckpointError, match=r"safetensors\.torch\.save_file"):
        load(tmp_path)
