"""Sparse vectors: `encode_sparse` against sentence-transformers' SparseEncoder, SPLADE and inference-free queries."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from headed import original, save_with_tokenizer
from parity import TOLERANCE, save_sentence_transformer, small_tokenizer, tiny_bert
from scipy.sparse import csr_array
from sentence_transformers import SparseEncoder
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding, SpladePooling

from jaxembed import Bucket, Embedder, Ladder, make_mesh, runner
from jaxembed.errors import (
    CorruptCheckpointError,
    InputError,
    InputTooLongError,
    InputTypeError,
    PromptNameError,
    TaskNameError,
    UnsupportedModelError,
)

KINDS = ("Bert", "DistilBert", "ModernBert", "XLMRoberta")
TEXTS = ["a b c", "", "hello world", "UPPER é", "[SEP] written [MASK] out", "x y z " * 20, "0 1 2 3 4", "a"]
PROMPTS = {"query": "a query: ", "passage": "p ", "other": "o "}


def load(folder: Path) -> Embedder:
    """On one device, with two buckets, of which one is flat."""
    ladder = Ladder([Bucket(4, 16), Bucket(4, 32, 64)])
    return Embedder.from_pretrained(folder, ladder=ladder, mesh=make_mesh(jax.devices()[:1]))


def dense(model: SparseEncoder, texts: list[str], how: str = "encode", **options: Any) -> np.ndarray:
    """Their vectors, with all their zeros."""
    return getattr(model, how)(texts, convert_to_sparse_tensor=False, **options).numpy()


def compare(ours: Embedder, theirs: SparseEncoder, how: str = "encode", **options: Any) -> float:
    """The largest difference, after checking it and that the same entries are 0."""
    task = {"encode": {}, "encode_query": {"task": "query"}, "encode_document": {"task": "document"}}[how]
    got, want = ours.encode_sparse(TEXTS, **task, **options), dense(theirs, TEXTS, how, **options)
    assert isinstance(got, csr_array)
    assert (got.dtype, got.shape) == (np.float32, want.shape)
    assert got.has_canonical_format
    apart = float(np.abs(got.todense() - want).max())
    assert apart <= TOLERANCE
    # An entry that is a rounding error away from 0 may be there in one of them only.
    assert np.abs(want[(got.todense() != 0) != (want != 0)]).max(initial=0) <= TOLERANCE
    return apart


def splade(folder: Path, kind: str, **pooling: Any) -> SparseEncoder:
    """A random SPLADE model of this kind; "hf" under the folder holds the transformer alone."""
    hf = save_with_tokenizer(original(kind, "MaskedLM"), kind, folder / "hf")
    modules = [Transformer(str(hf), transformer_task="fill-mask"), SpladePooling(**pooling)]
    return SparseEncoder(modules=modules, device="cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, SparseEncoder]:
    """SPLADE on BERT, as SparseEncoder writes it."""
    folder = tmp_path_factory.mktemp("splade")
    theirs = splade(folder, "Bert")
    theirs.prompts = {"query": "", "document": "", **PROMPTS}
    theirs.save(str(folder), create_model_card=False)
    return load(folder), theirs


@pytest.mark.parametrize("strategy", ["max", "sum"])
@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_parity(
    kind: str, activation: str, strategy: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """As SparseEncoder 6.2 writes a model: texts of all lengths, over-long ones and empty ones."""
    theirs = splade(tmp_path, kind, pooling_strategy=strategy, activation_function=activation)
    theirs.save(str(tmp_path), create_model_card=False)
    ours = load(tmp_path)
    assert ours.max_length == theirs.max_seq_length
    # Theirs in float64: sums over tokens are up to 40, where a step of float32 is 3.8e-6, and theirs is off by some.
    record_property("max abs diff", f"{compare(ours, theirs.double()):.1e}")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_transformers_alone(kind: str, tmp_path: Path) -> None:
    """It becomes SPLADE by the largest logit, as SparseEncoder makes of it."""
    folder = save_with_tokenizer(original(kind, "MaskedLM"), kind, tmp_path)
    compare(load(folder), SparseEncoder(str(folder), device="cpu"))


@pytest.mark.parametrize("strategy", ["max", "sum"])
def test_written_by_older_versions(strategy: str, tmp_path: Path) -> None:
    """MLMTransformer and the options' older names."""
    save_with_tokenizer(original("Bert", "MaskedLM"), "Bert", tmp_path)
    kinds = ("MLMTransformer", "SpladePooling")
    files = {
        "modules.json": [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.sparse_encoder.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ],
        "1_SpladePooling/config.json": {
            "pooling_strategy": strategy,
            "activation_function": "relu",
            "word_embedding_dimension": None,
        },
        "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "model_type": "SparseEncoder",
            "__version__": {"sentence_transformers": "5.0.0", "transformers": "4.50.0", "pytorch": "2.6.0"},
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    ours, theirs = load(tmp_path), SparseEncoder(str(tmp_path), device="cpu")
    assert ours.max_length == theirs.max_seq_length == 20
    compare(ours, theirs)


@pytest.mark.parametrize("kept", [1, 5, 1000])
def test_the_largest_entries_alone(kept: int, bert: tuple[Embedder, SparseEncoder]) -> None:
    """`max_active_dims` keeps that many of each vector."""
    ours, theirs = bert
    compare(ours, theirs, max_active_dims=kept)
    assert np.diff(ours.encode_sparse(TEXTS, max_active_dims=kept).indptr).max() <= kept


def test_the_checkpoint_says_how_many_entries(tmp_path: Path) -> None:
    """`max_active_dims` of config_sentence_transformers.json."""
    theirs = splade(tmp_path, "Bert")
    theirs.max_active_dims = 4
    theirs.save(str(tmp_path), create_model_card=False)
    ours = load(tmp_path)
    compare(ours, SparseEncoder(str(tmp_path), device="cpu"))
    assert np.diff(ours.encode_sparse(TEXTS).indptr).tolist() == [4] * len(TEXTS)
    compare(ours, theirs, max_active_dims=7)


def test_prompts_and_sides(bert: tuple[Embedder, SparseEncoder]) -> None:
    """`task` brings the prompt of its side, unless another is asked for."""
    for how in ("encode", "encode_query", "encode_document"):
        for options in ({}, {"prompt_name": "other"}, {"prompt": "c d "}, {"prompt": ""}):
            compare(*bert, how=how, **options)
    ours = bert[0]
    assert np.abs((ours.encode_sparse("b") - ours.encode_sparse("b", task="query")).todense()).max() > 1e-3
    with pytest.raises(PromptNameError, match="unknown prompt name 'mine'"):
        ours.encode_sparse("b", prompt_name="mine")
    with pytest.raises(TaskNameError, match="unknown task 'clustering'"):
        ours.encode_sparse("b", task="clustering")


def test_one_input_or_several(bert: tuple[Embedder, SparseEncoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Always a matrix; token ids are used as they are; windows make no difference."""
    ours = bert[0]
    whole = ours.encode_sparse(TEXTS).todense()
    assert ours.encode_sparse([]).shape == (0, 64)
    np.testing.assert_allclose(ours.encode_sparse(TEXTS[0]).todense(), whole[:1], atol=1e-6)
    np.testing.assert_allclose(ours.encode_sparse([2, 5, 6, 7, 3]).todense(), whole[:1], atol=1e-6)
    for window in (1, 3):
        monkeypatch.setattr(runner, "WINDOW", window)
        np.testing.assert_allclose(ours.encode_sparse(TEXTS).todense(), whole, atol=1e-6)


def routed(folder: Path, **options: Any) -> SparseEncoder:
    """Inference-free SPLADE: queries by a weight for each token, documents by BERT."""
    tokenizer = small_tokenizer(model_max_length=32)
    hf = save_with_tokenizer(original("Bert", "MaskedLM", vocab_size=len(tokenizer)), "Bert", folder / "hf")
    weight = torch.randn(len(tokenizer), generator=torch.Generator().manual_seed(0)).abs()
    router = Router.for_query_document(
        query_modules=[SparseStaticEmbedding(tokenizer, weight=weight)],
        document_modules=[Transformer(str(hf), transformer_task="fill-mask"), SpladePooling()],
        **options,
    )
    model = SparseEncoder(modules=[router], device="cpu")
    model.save(str(folder / "saved"), create_model_card=False)
    return SparseEncoder(str(folder / "saved"), device="cpu")


def test_queries_without_inference(tmp_path: Path) -> None:
    """Each side goes its own way; a token that comes twice counts once; there are no special tokens."""
    theirs = routed(tmp_path)
    ours = load(tmp_path / "saved")
    for how in ("encode_query", "encode_document", "encode"):
        compare(ours, theirs, how=how)
    query = ours.encode_sparse("b a b", task="query")
    assert sorted(token for token, _ in ours.decode_sparse(query)[0]) == ["a", "b"]
    assert ours.encode_sparse("", task="query").nnz == 0
    documents = ours.encode_sparse(TEXTS, task="document")
    want = dense(theirs, ["b a b"], "encode_query") @ dense(theirs, TEXTS, "encode_document").T
    np.testing.assert_allclose(ours.similarity(query, documents), want, atol=TOLERANCE, rtol=0)
    with pytest.raises(TaskNameError, match="unknown task 'clustering'; known: 'document', 'query'"):
        ours.encode_sparse("a", task="clustering")


def test_a_side_must_be_named(tmp_path: Path) -> None:
    """Where the Router has no default."""
    routed(tmp_path, default_route=None, allow_empty_key=False)
    ours = load(tmp_path / "saved")
    with pytest.raises(TaskNameError, match="a task must be named; known: 'document', 'query'"):
        ours.encode_sparse("a")
    assert ours.encode_sparse("a", task="document").shape == (1, 62)


def test_static_weights_alone(tmp_path: Path) -> None:
    """Both sides by the weights; over-long texts are cut where the tokenizer says."""
    theirs = SparseEncoder(
        modules=[SparseStaticEmbedding(small_tokenizer(model_max_length=6), weight=torch.arange(62.0) + 1)],
        device="cpu",
    )
    theirs.save(str(tmp_path), create_model_card=False)
    ours = load(tmp_path)
    assert ours.max_length == 6
    compare(ours, theirs)
    with pytest.raises(InputTooLongError, match=r"input\[1\] has 7 tokens"):
        ours.encode_sparse(["a", "a b c d e f g"], truncate=False)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"config.json": {"frozen": False, "path": "idf.json"}},
            UnsupportedModelError,
            r"takes its weights from 'idf.json'; supported: from model.safetensors",
        ),
        ({"weight": torch.ones(3, 2)}, CorruptCheckpointError, "holds no list of weights under the name 'weight'"),
        ({"other": torch.ones(57)}, CorruptCheckpointError, "holds no list of weights under the name 'weight'"),
        ({"behind": "Normalize"}, UnsupportedModelError, "'Normalize' in .* cannot stand behind SparseStaticEmbedding"),
    ],
    ids=["path", "shape", "name", "behind"],
)
def test_broken_static_weights(change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    """By name, with what would do."""
    from safetensors.torch import save_file

    theirs = SparseEncoder(modules=[SparseStaticEmbedding(small_tokenizer())], device="cpu")
    theirs.save(str(tmp_path), create_model_card=False)
    ((name, value),) = change.items()
    if name == "config.json":
        (tmp_path / name).write_text(json.dumps(value))
    elif name == "behind":
        lines = json.loads((tmp_path / "modules.json").read_text())
        line = {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"sentence_transformers.models.{value}"}
        (tmp_path / "modules.json").write_text(json.dumps([*lines, line]))
    else:
        save_file({name: value}, tmp_path / "model.safetensors")
    with pytest.raises(error, match=message):
        load(tmp_path)


def test_similarity(bert: tuple[Embedder, SparseEncoder], tmp_path: Path) -> None:
    """The dot product, unless the checkpoint names another; single vectors and dense ones may be given."""
    ours, theirs = bert
    got, want = ours.encode_sparse(TEXTS), theirs.encode(TEXTS)
    np.testing.assert_allclose(
        ours.similarity(got, got[:3]), theirs.similarity(want, want.to_dense()[:3]).numpy(), rtol=1e-5
    )
    np.testing.assert_allclose(ours.similarity(got, got[[0]].todense()), ours.similarity(got, got)[:, :1], rtol=1e-6)
    cosine = splade(tmp_path, "Bert")
    cosine.similarity_fn_name = "cosine"
    cosine.save(str(tmp_path), create_model_card=False)
    ours = load(tmp_path)
    np.testing.assert_allclose(
        ours.similarity(got, got), cosine.similarity(want.to_dense(), want.to_dense()).numpy(), atol=1e-5
    )
    nothing = csr_array((1, 64), dtype=np.float32)
    assert ours.similarity(nothing, got).tolist() == [[0.0] * len(TEXTS)]
    extra = tmp_path / "config_sentence_transformers.json"
    extra.write_text(json.dumps({**json.loads(extra.read_text()), "similarity_fn_name": "manhattan"}))
    with pytest.raises(UnsupportedModelError, match="'manhattan'; of sparse vectors supported: cosine, dot"):
        load(tmp_path).similarity(got, got)


@pytest.mark.parametrize("top_k", [None, 3])
def test_decode(top_k: int | None, bert: tuple[Embedder, SparseEncoder]) -> None:
    """Tokens and weights, the largest first."""
    ours, theirs = bert
    rows = ours.encode_sparse(TEXTS)
    got, want = ours.decode_sparse(rows, top_k), theirs.decode(theirs.encode(TEXTS), top_k=top_k)
    # The model knows 64 tokens and the tokenizer 62: the others have no name.
    want = [[(token or "", weight) for token, weight in row] for row in want]
    assert [[token for token, _ in row] for row in got] == [[token for token, _ in row] for row in want]
    np.testing.assert_allclose([w for row in got for _, w in row], [w for row in want for _, w in row], atol=TOLERANCE)
    single = ours.decode_sparse(rows.todense()[0], 3)
    assert [token for token, _ in single[0]] == [token for token, _ in got[0][:3]]
    assert len(single) == 1
    with pytest.raises(InputError, match="top_k is 0; allowed: a whole number from 1 on"):
        ours.decode_sparse(rows, 0)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (["a", 5], {}, InputTypeError, "input[1] must be a string, not int"),
        (None, {}, InputTypeError, "not NoneType"),
        (["a", "\ud800"], {}, InputTypeError, "input[1] holds half of a surrogate pair"),
        (["a", "b " * 40], {"truncate": False}, InputTooLongError, "input[1] has 42 tokens"),
        ("a", {"max_active_dims": 0}, InputError, "max_active_dims is 0; allowed: a whole number from 1 on"),
        ("a", {"max_active_dims": True}, InputError, "max_active_dims is True; allowed"),
    ],
    ids=repr,
)
def test_wrong_inputs(
    inputs: Any,
    options: dict[str, Any],
    error: type[InputError],
    message: str,
    bert: tuple[Embedder, SparseEncoder],
) -> None:
    """What is wrong is named, with what is allowed."""
    with pytest.raises(error, match=re.escape(message)):
        bert[0].encode_sparse(inputs, **options)


def test_models_of_other_kinds(tiny: Embedder, bert: tuple[Embedder, SparseEncoder], tmp_path: Path) -> None:
    """They say what they give."""
    with pytest.raises(UnsupportedModelError, match=r"does not give sparse vectors .* it gives one vector for a text"):
        tiny.encode_sparse([])
    with pytest.raises(UnsupportedModelError, match=r"does not give one vector .* it gives sparse vectors"):
        bert[0].encode("a")
    save_sentence_transformer(tiny_bert(), tmp_path)
    settings = tmp_path / "sentence_bert_config.json"
    settings.write_text(json.dumps({"transformer_task": "fill-mask"}))
    with pytest.raises(Exception, match=r"cls\.predictions\.transform\.dense\.weight"):
        load(splade_without_head(tmp_path / "without"))


def splade_without_head(folder: Path) -> Path:
    """A SPLADE folder whose weights are the encoder's alone."""
    splade(folder, "Bert").save(str(folder), create_model_card=False)
    tiny_bert().save_pretrained(folder)
    return folder
