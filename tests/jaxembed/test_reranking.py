"""Cross-encoders and classifiers: `predict`, `rerank`, `classify` against sentence-transformers' CrossEncoder."""

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
from parity import TOLERANCE, tiny_bert
from sentence_transformers import CrossEncoder
from transformers import BertForSequenceClassification

from jaxembed import Bucket, Embedder, Ladder, make_mesh, runner
from jaxembed.errors import InputError, InputTooLongError, InputTypeError, PromptNameError, UnsupportedModelError
from jaxembed.reranking import Ranked
from jaxembed.types import Output

KINDS = ("Bert", "DistilBert", "ModernBert", "XLMRoberta")

PAIRS = [
    ("a b c", "d e f g"),
    ("a b c", "0 1 2"),
    ("hello world", "hello there world"),
    ("", "x"),
    ("x", ""),
    ("", ""),
    ("UPPER é", "[SEP] written [MASK] out"),
    ("a " * 40, "b c"),
    ("b c", "a " * 40),
    ("a b " * 20, "c d " * 25),
    ("a " * 14, "b " * 15),
    ("a " * 16, "b " * 14),
]


def write(folder: Path, kind: str, labels: int, *, save: bool = False, **extra: Any) -> tuple[Path, CrossEncoder]:
    """A random cross-encoder of this kind, as transformers writes it or as CrossEncoder does; and theirs, loaded."""
    plain = save_with_tokenizer(original(kind, "SequenceClassification", num_labels=labels), kind, folder / "plain")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, **extra}))
    theirs = CrossEncoder(str(plain), device="cpu")
    if not save:
        return plain, theirs
    theirs.save(str(folder / "saved"))
    return folder / "saved", CrossEncoder(str(folder / "saved"), device="cpu")


def load(folder: Path) -> Embedder:
    """On one device, with two buckets, of which one is flat."""
    ladder = Ladder([Bucket(4, 16, 40), Bucket(4, 32)])
    return Embedder.from_pretrained(folder, ladder=ladder, mesh=make_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, CrossEncoder]:
    """BERT with one label."""
    folder, theirs = write(tmp_path_factory.mktemp("one"), "Bert", 1)
    return load(folder), theirs


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Embedder, CrossEncoder]:
    """BERT with three labels."""
    folder, theirs = write(tmp_path_factory.mktemp("three"), "Bert", 3, save=True)
    return load(folder), theirs


@pytest.mark.parametrize("save", [False, True], ids=["transformers", "CrossEncoder"])
@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_parity(
    kind: str, labels: int, save: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Logits, and scores behind the default activation: pairs of all lengths, over-long ones and empty ones."""
    folder, theirs = write(tmp_path, kind, labels, save=save)
    ours = load(folder)
    assert ours.max_length == theirs.max_seq_length
    got = ours.predict(PAIRS, activation="identity")
    want = theirs.predict(PAIRS, activation_fn=torch.nn.Identity())
    assert got.dtype == np.float32
    assert got.shape == want.shape == ((len(PAIRS),) if labels == 1 else (len(PAIRS), 3))
    assert np.ptp(want) > 0.1
    apart = float(np.abs(got - want).max())
    record_property("max abs diff", f"{apart:.1e}")
    assert apart <= TOLERANCE
    np.testing.assert_allclose(ours.predict(PAIRS), theirs.predict(PAIRS), atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(ours.predict(PAIRS, activation="softmax"), softmaxed(theirs), atol=TOLERANCE, rtol=0)


def softmaxed(theirs: CrossEncoder) -> np.ndarray:
    """Their probabilities; of a single label, 1."""
    logits = torch.from_numpy(theirs.predict(PAIRS, activation_fn=torch.nn.Identity()).reshape(len(PAIRS), -1))
    return torch.nn.functional.softmax(logits, dim=1).numpy().squeeze()


def test_token_types_matter(one: tuple[Embedder, CrossEncoder]) -> None:
    """The second text's tokens are of type 1, as the tokenizer says."""
    ours, _ = one
    encoding = ours.tokenizer.encode_pairs([("a b", "c")])[0]
    assert (encoding.ids.tolist(), encoding.second_start) == ([2, 5, 6, 3, 7, 3], 4)
    single = ours.classify("a b [SEP] c")
    assert ours.tokenizer.encode_texts(["a b [SEP] c"])[0].ids.tolist() == encoding.ids.tolist()
    assert np.abs(ours.predict(("a b", "c")) - single).max() > 1e-3


@pytest.mark.parametrize("top_k", [None, 1, 4, 100])
def test_rerank(top_k: int | None, one: tuple[Embedder, CrossEncoder]) -> None:
    """The order and the scores of `CrossEncoder.rank`."""
    ours, theirs = one
    documents = [second for _, second in PAIRS]
    got = ours.rerank("a b c", documents, top_k=top_k)
    want = theirs.rank("a b c", documents, top_k=top_k, return_documents=True)
    assert [(each.index, each.document) for each in got] == [(each["corpus_id"], each["text"]) for each in want]
    np.testing.assert_allclose([each.score for each in got], [each["score"] for each in want], atol=TOLERANCE)
    assert [type(value) for value in (got[0].index, got[0].score)] == [int, float]


@pytest.mark.parametrize("task", ["SequenceClassification", "MaskedLM"])
def test_any_number_of_devices(task: str, tmp_path: Path) -> None:
    """Rows over two of them, the model over two: the numbers are those of one. With bfloat16 they are near."""
    folder = save_with_tokenizer(original("Bert", task), "Bert", tmp_path)
    ladder = Ladder([Bucket(4, 32)])

    def run(**options: Any) -> np.ndarray:
        model = Embedder.from_pretrained(folder, ladder=ladder, **options)
        if task == "MaskedLM":
            return model.encode_sparse([second for _, second in PAIRS]).todense()
        return model.predict(PAIRS)

    one = run(mesh=make_mesh(jax.devices()[:1]))
    np.testing.assert_allclose(run(mesh=make_mesh(jax.devices()[:4], model_parallel=2)), one, atol=TOLERANCE, rtol=0)
    near = run(mesh=make_mesh(jax.devices()[:1]), dtype="bfloat16")
    assert 0 < np.abs(near - one).max() < 0.1


def test_equals_stay_in_order(one: tuple[Embedder, CrossEncoder]) -> None:
    """The same text twice has the same score."""
    got = one[0].rerank("a", ["b", "c", "b", "c", "b"])
    assert [each.index for each in got] in ([0, 2, 4, 1, 3], [1, 3, 0, 2, 4])
    assert one[0].rerank("a", []) == []
    assert one[0].rerank("a", ("b",))[0] == Ranked(0, float(one[0].predict([("a", "b")])[0]), "b")


def test_one_pair_or_several(one: tuple[Embedder, CrossEncoder], three: tuple[Embedder, CrossEncoder]) -> None:
    """A pair alone gives no axis of its own; tuples, lists and arrays are alike."""
    for ours, theirs in (one, three):
        whole = ours.predict([("a", "b"), ("c", "d")])
        for pair in (("a", "b"), ["a", "b"], np.array(["a", "b"])):
            assert ours.predict(pair).shape == np.shape(theirs.predict(pair))
            np.testing.assert_allclose(ours.predict(pair), whole[0], atol=1e-6)
        for pairs in ([["a", "b"], ["c", "d"]], (("a", "b"), ("c", "d")), np.array([["a", "b"], ["c", "d"]])):
            np.testing.assert_array_equal(ours.predict(pairs), whole)
    assert one[0].predict([]).shape == (0,)
    assert three[0].predict([]).shape == (0, 3)


def test_classify(three: tuple[Embedder, CrossEncoder]) -> None:
    """Single texts, as transformers classifies them; token ids too."""
    ours, theirs = three
    texts = ["a b c", "", "hello world", "a " * 40]
    with torch.no_grad():
        inputs = theirs.tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        want = theirs.model(**inputs).logits.numpy()
    np.testing.assert_allclose(ours.classify(texts), want, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(ours.classify("a b c"), want[0], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(ours.classify([2, 5, 6, 7, 3]), want[0], atol=TOLERANCE, rtol=0)
    probabilities = ours.classify(texts, activation="softmax")
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    assert ours.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_labels_have_names(tmp_path: Path) -> None:
    """Those of config.json, in the order of their numbers."""
    folder, _ = write(tmp_path, "Bert", 3, id2label={"2": "c", "0": "a", "1": "b"})
    assert load(folder).labels == ("a", "b", "c")


ACTIVATIONS = {
    "torch.nn.modules.activation.Sigmoid": torch.nn.Sigmoid(),
    "torch.nn.modules.activation.Tanh": torch.nn.Tanh(),
    "torch.nn.modules.activation.ReLU": torch.nn.ReLU(),
    "torch.nn.modules.linear.Identity": torch.nn.Identity(),
}


@pytest.mark.parametrize("named", ACTIVATIONS)
@pytest.mark.parametrize("where", ["sentence_transformers", "sbert_ce_default_activation_function", "saved"])
def test_the_checkpoint_names_the_activation(where: str, named: str, tmp_path: Path) -> None:
    """In config.json, in its older form, and in config_sentence_transformers.json, which wins."""
    extra: dict[str, Any] = {"sentence_transformers": {"activation_fn": named}}
    if where == "sbert_ce_default_activation_function":
        extra = {where: named}
    folder, theirs = write(tmp_path, "Bert", 1, **(extra if where != "saved" else {}))
    if where == "saved":
        theirs.activation_fn = ACTIVATIONS[named]
        theirs.save(str(tmp_path / "saved"))
        folder, theirs = tmp_path / "saved", CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert type(theirs.activation_fn) is type(ACTIVATIONS[named])
    np.testing.assert_allclose(load(folder).predict(PAIRS), theirs.predict(PAIRS), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("named", ["my.own.Activation", "torch.nn.modules.activation.GLU", "other.Sigmoid"])
def test_an_unknown_activation(named: str, tmp_path: Path) -> None:
    """By name; whoever says what to do instead need not care."""
    folder, _ = write(tmp_path, "Bert", 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sentence_transformers": {"activation_fn": named}}))
    ours = load(folder)
    with pytest.raises(UnsupportedModelError, match=re.escape(f"is {named!r}; supported: torch's Identity, ReLU")):
        ours.predict(PAIRS)
    assert ours.predict(PAIRS, activation="sigmoid").shape == (len(PAIRS),)


def test_prompts(tmp_path: Path) -> None:
    """Before the first text of a pair: the default one, one that is named, one that is given."""
    plain, _ = write(tmp_path, "Bert", 1)
    theirs = CrossEncoder(
        str(plain), device="cpu", prompts={"query": "a query: ", "other": "b "}, default_prompt_name="query"
    )
    theirs.save(str(tmp_path / "saved"))
    ours = load(tmp_path / "saved")
    for options in ({}, {"prompt_name": "other"}, {"prompt": "c d "}, {"prompt": ""}):
        np.testing.assert_allclose(ours.predict(PAIRS, **options), theirs.predict(PAIRS, **options), atol=TOLERANCE)
        got = ours.rerank("a b", ["c", "d e"], **options)
        want = theirs.rank("a b", ["c", "d e"], **options)
        assert [each.index for each in got] == [each["corpus_id"] for each in want]
    assert np.abs(ours.predict(PAIRS) - ours.predict(PAIRS, prompt="")).max() > 1e-4
    with pytest.raises(PromptNameError, match="unknown prompt name 'mine'"):
        ours.rerank("a", ["b"], prompt_name="mine")


def test_cut_on_the_left(tmp_path: Path) -> None:
    """Where the tokenizer's files say so, each text loses its beginning."""
    plain, _ = write(tmp_path, "Bert", 1)
    file = plain / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "truncation_side": "left"}))
    theirs = CrossEncoder(str(plain), device="cpu")
    pairs = [("a b c d " * 10, "0 1 2 3 4 " * 10), ("a b c d " * 10, "0 1"), ("a b", "0 1 2 3 4 " * 10)]
    np.testing.assert_allclose(load(plain).predict(pairs), theirs.predict(pairs), atol=TOLERANCE, rtol=0)


def test_over_long_pairs_are_refused_on_request(
    one: tuple[Embedder, CrossEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The item is named, in any window."""
    pairs = [("a", "b")] * 5 + [("a " * 20, "b " * 20)]
    for window in (2, 100):
        monkeypatch.setattr(runner, "WINDOW", window)
        with pytest.raises(
            InputTooLongError, match=r"input\[5\] has 43 tokens, but this model takes at most 32"
        ) as caught:
            one[0].predict(pairs, truncate=False)
        assert caught.value.index == 5
        with pytest.raises(InputTooLongError, match=r"input\[1\] has 43 tokens"):
            one[0].rerank("a " * 20, ["b", "b " * 20], truncate=False)
    assert one[0].predict([("a " * 14, "b " * 15)], truncate=False).shape == (1,)


def test_windows_make_no_difference(one: tuple[Embedder, CrossEncoder], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores find their pairs again."""
    whole = one[0].predict(PAIRS)
    for window in (1, 5, len(PAIRS)):
        monkeypatch.setattr(runner, "WINDOW", window)
        np.testing.assert_allclose(one[0].predict(PAIRS), whole, atol=1e-6)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("a", "the input must be a pair of strings or a list of pairs, not str; classify takes texts"),
        (5, "the input must be a pair of strings or a list of pairs, not int"),
        ([("a", "b"), "c"], "input[1] must be a pair of strings, not str"),
        ([("a", "b"), ("c",)], "input[1] must be a pair of strings, not of str"),
        ([("a", "b", "c")], "input[0] must be a pair of strings, not of str, str, str"),
        (["a"], "input[0] must be a pair of strings, not of str"),
        ([("a", "b"), ("c", 5)], "input[1] must be a pair of strings, not of str, int"),
        ([("a", "b"), (None, "d")], "input[1] must be a pair of strings, not of NoneType, str"),
        ([("a", "b"), ()], "input[1] must be a pair of strings, not of nothing"),
        ([("a", "b"), 5], "input[1] must be a pair of strings, not int"),
        ([("a", "b"), ("c", "\ud800")], "input[1] holds half of a surrogate pair"),
    ],
    ids=repr,
)
def test_wrong_pairs(pairs: Any, message: str, one: tuple[Embedder, CrossEncoder]) -> None:
    """The first wrong item is named, with what it is."""
    with pytest.raises(InputTypeError, match=re.escape(message)):
        one[0].predict(pairs)


@pytest.mark.parametrize(
    ("query", "documents", "options", "error", "message"),
    [
        (5, ["a"], {}, InputTypeError, "the query must be a string, not int"),
        (["a"], ["a"], {}, InputTypeError, "the query must be a string, not list"),
        ("a", "b", {}, InputTypeError, "documents must be a list of strings, not str"),
        ("a", None, {}, InputTypeError, "documents must be a list of strings, not NoneType"),
        ("a", {"b"}, {}, InputTypeError, "documents must be a list of strings, not set"),
        ("a", ["b", 5], {}, InputTypeError, "documents[1] must be a string, not int"),
        ("a", ["b", ["c"]], {}, InputTypeError, "documents[1] must be a string, not list"),
        ("a", ["b", "\ud800"], {}, InputTypeError, "input[1] holds half of a surrogate pair"),
        ("a", ["b"], {"top_k": 0}, InputError, "top_k is 0; allowed: a whole number from 1 on"),
        ("a", ["b"], {"top_k": True}, InputError, "top_k is True; allowed"),
        ("a", ["b"], {"activation": "gelu"}, InputError, "activation is 'gelu'; allowed: identity, relu, sigmoid"),
    ],
    ids=repr,
)
def test_wrong_queries_and_documents(
    query: Any,
    documents: Any,
    options: dict[str, Any],
    error: type[InputError],
    message: str,
    one: tuple[Embedder, CrossEncoder],
) -> None:
    """What is wrong is named, with what is allowed."""
    with pytest.raises(error, match=re.escape(message)):
        one[0].rerank(query, documents, **options)


def test_models_that_cannot_rank(tiny: Embedder, three: tuple[Embedder, CrossEncoder]) -> None:
    """One without a head says what it gives; one with several labels, that `predict` gives their scores."""
    for call in (lambda: tiny.rerank("a", []), lambda: tiny.predict([("a", "b")]), lambda: tiny.classify("a")):
        with pytest.raises(
            UnsupportedModelError, match=r"does not give scores of texts and pairs .* it gives one vector"
        ):
            call()
    with pytest.raises(UnsupportedModelError, match="the labels LABEL_0, LABEL_1, LABEL_2; rerank needs"):
        three[0].rerank("a", ["b"])
    with pytest.raises(UnsupportedModelError, match="does not give one vector for a text"):
        three[0].encode("a")
    assert three[0].model.outputs == {three[0].engine.output} == {Output.SCORES}


def test_a_saved_folder_without_its_head(tmp_path: Path) -> None:
    """It is asked for in so many words: nothing else can be had."""
    folder, _ = write(tmp_path, "Bert", 1, save=True)
    tiny_bert().save_pretrained(folder)
    with pytest.raises(Exception, match=r"classifier\.weight"):
        load(folder)


def test_vectors_of_a_cross_encoder_s_encoder(tmp_path: Path) -> None:
    """A folder of transformers alone still gives mean-pooled vectors, token types of single texts."""
    folder, _ = write(tmp_path, "Bert", 1)
    model = BertForSequenceClassification.from_pretrained(folder).bert.eval()
    ids = torch.tensor([[2, 5, 6, 7, 3]])
    with torch.no_grad():
        want = model(ids).last_hidden_state.mean(dim=1).numpy()[0]
    np.testing.assert_allclose(load(folder).encode("a b c"), want, atol=TOLERANCE, rtol=0)
