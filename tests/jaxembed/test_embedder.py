"""The facade: what `encode` takes and gives, what it refuses, and `apply` as a function to differentiate."""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity import save_sentence_transformer, tiny_bert
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import SimilarityFunction

from jaxembed import Bucket, Embedder, Ladder, make_mesh, runner
from jaxembed.errors import (
    CheckpointNotFoundError,
    DimensionsError,
    InputError,
    InputTooLongError,
    InputTypeError,
    PromptNameError,
    TokenIdError,
    UnsupportedModelError,
)
from jaxembed.types import Batch
from jaxembed.weights import checkpoint_name

WIDTH = 16
PROMPTS = {"query": "q ", "passage": "p ", "corpus": "c "}
TEXTS = ["a", "b c d e f g h i j k", "c d", "x y z 0 1 2 3 4 " * 6, "", "e f g", "q r s t u v w"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[SentenceTransformer, Path]:
    """A tiny sentence-transformers model, mean pooling and Normalize; and its folder."""
    folder = tmp_path_factory.mktemp("sentence-transformer")
    return save_sentence_transformer(tiny_bert(seed=3), folder), folder


@pytest.fixture(scope="module")
def theirs(saved: tuple[SentenceTransformer, Path]) -> SentenceTransformer:
    """The reference."""
    return saved[0]


@pytest.fixture(scope="module")
def model(saved: tuple[SentenceTransformer, Path]) -> Embedder:
    """Ours, on one device with three buckets."""
    ladder = Ladder([Bucket(1, 32), Bucket(4, 8), Bucket(4, 32)])
    model = Embedder.from_pretrained(saved[1], ladder=ladder, mesh=make_mesh(jax.devices()[:1]))
    # Sentence-transformers adds an empty "document" prompt of its own accord.
    return with_checkpoint(model, prompts=PROMPTS)


def with_checkpoint(model: Embedder, **changes: Any) -> Embedder:
    """The same model under another configuration, sharing what is compiled."""
    checkpoint = replace(model.model.checkpoint, **changes)
    return Embedder(replace(model.model, checkpoint=checkpoint), model.tokenizer, model.engine)


def test_one_text_is_a_vector_and_several_a_matrix(model: Embedder) -> None:
    """float32; a list of one is a matrix of one row, equal to the vector."""
    one, listed = model.encode("a b"), model.encode(["a b"])
    assert (one.shape, one.dtype) == ((WIDTH,), np.float32)
    assert listed.shape == (1, WIDTH)
    np.testing.assert_array_equal(one, listed[0])


def test_the_order_is_the_caller_s(model: Embedder) -> None:
    """Rows are sorted by length on the way and come back to their places."""
    together = model.encode(TEXTS)
    for text, vector in zip(TEXTS, together, strict=True):
        np.testing.assert_allclose(model.encode(text), vector, atol=1e-6)
    np.testing.assert_allclose(model.encode(TEXTS[::-1]), together[::-1], atol=1e-6)
    assert len({vector.tobytes() for vector in together}) == len(TEXTS)


@pytest.mark.parametrize("nothing", [[], (), np.zeros((0, 3), np.int64)], ids=repr)
def test_no_inputs(model: Embedder, nothing: Any) -> None:
    """A matrix without rows, as wide as asked."""
    assert model.encode(nothing).shape == (0, WIDTH)
    assert model.encode(nothing, dimensions=5).shape == (0, 5)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_sequences_of_texts(model: Embedder, kind: Any) -> None:
    """Lists, tuples and arrays of strings."""
    np.testing.assert_array_equal(model.encode(kind(TEXTS)), model.encode(TEXTS))


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_token_ids(model: Embedder, kind: Any) -> None:
    """A text's own ids give the text's vector: a flat sequence is one input, a nested one several."""
    ids = [encoding.ids.tolist() for encoding in model.tokenizer.encode_texts(["a b c", "d e f"])]
    expected = model.encode(["a b c", "d e f"])
    np.testing.assert_array_equal(model.encode(kind(ids)), expected)
    assert model.encode(kind(ids[0])).shape == (WIDTH,)
    np.testing.assert_allclose(model.encode(kind(ids[0])), expected[0], atol=1e-6)
    np.testing.assert_array_equal(model.encode([np.array(ids[0]), tuple(ids[1])]), expected)


def test_token_ids_are_used_as_they_are(model: Embedder) -> None:
    """No prompt and no special tokens; without them the vector is another one."""
    np.testing.assert_array_equal(model.encode([5, 6, 7], prompt_name="query"), model.encode([5, 6, 7]))
    whole = model.tokenizer.encode_texts(["a b c"])[0].ids.tolist()
    assert np.abs(model.encode(whole) - model.encode(whole[1:-1])).max() > 1e-2


def test_dimensions_cut_and_then_normalise(model: Embedder) -> None:
    """Unit vectors of every size, in the direction of the whole one's beginning."""
    whole = model.encode(TEXTS)
    for size in (1, 5, WIDTH):
        got = model.encode(TEXTS, dimensions=size)
        assert got.shape == (len(TEXTS), size)
        expected = whole[:, :size] / np.linalg.norm(whole[:, :size], axis=1, keepdims=True)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    assert model.encode("a", dimensions=5).shape == (5,)


@pytest.mark.parametrize("size", [0, -1, WIDTH + 1])
def test_impossible_dimensions(model: Embedder, size: int) -> None:
    """The range is named."""
    with pytest.raises(DimensionsError, match=f"dimensions is {size}; allowed: 1 to {WIDTH}"):
        model.encode("a", dimensions=size)


def test_normalize_is_the_model_s_unless_asked(model: Embedder, theirs: SentenceTransformer) -> None:
    """True and False win over the modules."""
    raw = model.encode(TEXTS, normalize=False)
    lengths = np.linalg.norm(raw, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 1e-2
    np.testing.assert_allclose(model.encode(TEXTS), raw / lengths, atol=1e-6)
    np.testing.assert_array_equal(model.encode(TEXTS, normalize=True), model.encode(TEXTS))
    without = with_checkpoint(model, normalize=False)
    np.testing.assert_array_equal(without.encode(TEXTS), raw)
    np.testing.assert_array_equal(without.encode(TEXTS, normalize=True), model.encode(TEXTS))
    np.testing.assert_allclose(model.encode(TEXTS), theirs.encode(TEXTS), atol=1e-6)


def test_prompts(model: Embedder) -> None:
    """`prompt` wins over `prompt_name`, which wins over the default; "" is a prompt."""
    plain, query = model.encode("a"), model.encode("q a")
    np.testing.assert_array_equal(model.encode("a", prompt_name="query"), query)
    np.testing.assert_array_equal(model.encode("a", prompt="q "), query)
    np.testing.assert_array_equal(model.encode("a", prompt="q ", prompt_name="passage"), query)
    default = with_checkpoint(model, default_prompt_name="query")
    np.testing.assert_array_equal(default.encode("a"), query)
    np.testing.assert_array_equal(default.encode("a", prompt=""), plain)
    np.testing.assert_array_equal(default.encode("a", prompt_name="passage"), model.encode("p a"))
    assert model.prompts == PROMPTS


def test_an_unknown_prompt_name(model: Embedder) -> None:
    """The known ones are listed; also when there is nothing to encode."""
    for inputs in ("a", []):
        with pytest.raises(PromptNameError, match="'queries'; known: 'corpus', 'passage', 'query'"):
            model.encode(inputs, prompt_name="queries")


def test_queries_and_documents(model: Embedder) -> None:
    """The task's prompt, the first there is, unless the caller asks for one; the default is for neither of the two."""
    np.testing.assert_array_equal(model.encode_query("a"), model.encode("q a"))
    np.testing.assert_array_equal(model.encode_document("a"), model.encode("p a"))
    np.testing.assert_array_equal(model.encode_document("a", prompt_name="query"), model.encode("q a"))
    np.testing.assert_array_equal(model.encode_query("a", prompt="c "), model.encode("c a"))
    assert model.encode_query(["a", "b"], dimensions=3).shape == (2, 3)
    corpus = with_checkpoint(model, prompts={"corpus": "c "})
    np.testing.assert_array_equal(corpus.encode_document("a"), model.encode("c a"))
    np.testing.assert_array_equal(corpus.encode_query("a"), model.encode("a"))
    document = with_checkpoint(model, prompts={"passage": "p ", "document": "d "}, default_prompt_name="passage")
    np.testing.assert_array_equal(document.encode_document("a"), model.encode("d a"))
    np.testing.assert_array_equal(document.encode_query("a"), model.encode("a"))
    np.testing.assert_array_equal(document.encode("a"), model.encode("p a"))


@pytest.mark.parametrize("measure", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity(model: Embedder, measure: str) -> None:
    """Sentence-transformers' own functions, for matrices, single vectors and lists, with a zero vector among them."""
    ours = with_checkpoint(model, similarity=measure)
    a = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    b = np.concatenate([np.random.default_rng(1).normal(size=(3, 5)), np.zeros((1, 5))]).astype(np.float32)
    expected = SimilarityFunction.to_similarity_fn(measure)(a, b).numpy()
    got = ours.similarity(a, b)
    assert (got.shape, got.dtype) == ((3, 4), np.float32)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(ours.similarity(a[0], b[1]), expected[:1, 1:2], atol=1e-5)
    np.testing.assert_allclose(ours.similarity(a.tolist(), b.tolist()), expected, atol=1e-5)


def test_an_unknown_similarity(model: Embedder) -> None:
    """Named, with those there are."""
    with pytest.raises(UnsupportedModelError, match="similarity_fn_name is 'maxsim'; supported: cosine, dot"):
        with_checkpoint(model, similarity="maxsim").similarity([1.0], [1.0])


def test_the_progress_bar(model: Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error and only when asked for; it counts texts and ends full."""
    model.encode(TEXTS)
    assert capsys.readouterr() == ("", "")
    model.encode(TEXTS, show_progress_bar=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"{len(TEXTS)}/{len(TEXTS)}" in shown.err.split("\r")[-1]


def test_windows_do_not_show(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken two by two, the inputs give the same vectors in the same places."""
    whole = model.encode(TEXTS)
    ids = [encoding.ids for encoding in model.tokenizer.encode_texts(TEXTS, truncate_to=32)]
    for window in (1, 2, len(TEXTS) - 1, len(TEXTS), len(TEXTS) + 1):
        monkeypatch.setattr(runner, "WINDOW", window)
        np.testing.assert_allclose(model.encode(TEXTS), whole, atol=1e-6)
        np.testing.assert_allclose(model.encode(ids), whole, atol=1e-6)


@pytest.mark.parametrize("at_a_time", [1, 2, 5])
def test_batches_side_by_side(model: Embedder, monkeypatch: pytest.MonkeyPatch, at_a_time: int) -> None:
    """None is lost at the end, and each row finds its place, however many run at a time."""
    monkeypatch.setattr(model.engine, "side_by_side", 1)
    whole = model.encode(TEXTS * 3)
    monkeypatch.setattr(model.engine, "side_by_side", at_a_time)
    np.testing.assert_array_equal(model.encode(TEXTS * 3), whole)


def test_very_long_rows_run_one_at_a_time(
    saved: tuple[SentenceTransformer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of them would take twice the memory; the others run two at a time, after them."""
    ladder = Ladder([Bucket(1, 32), Bucket(2, 4)])
    model = Embedder.from_pretrained(saved[1], ladder=ladder, mesh=make_mesh(jax.devices()[:1]))
    run, lock, running, most = model.engine.run, threading.Lock(), list[Bucket](), dict[Bucket, int]()
    pair = threading.Barrier(2)

    def counting(batch: Batch) -> np.ndarray:
        with lock:
            running.append(batch.bucket)
            most[batch.bucket] = max(most.get(batch.bucket, 0), len(running))
        if batch.bucket == Bucket(2, 4):
            pair.wait(30)
        try:
            return run(batch)
        finally:
            with lock:
                running.remove(batch.bucket)

    monkeypatch.setattr(model.engine, "run", counting)
    long, short = [[5] * 30, [6] * 31, [7] * 32], [[n] * 4 for n in range(5, 13)]
    vectors = model.encode([*short, *long])
    assert most == {Bucket(1, 32): 1, Bucket(2, 4): 2}
    assert np.isfinite(vectors).all() and len(np.unique(vectors.round(6), axis=0)) == 11


def test_a_batch_that_fails_among_others(model: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error comes out as it is, and the next call works."""
    whole, run, calls = model.encode(TEXTS * 3), model.engine.run, iter(range(100))

    def failing(batch: Batch) -> np.ndarray:
        if next(calls) == 1:
            raise RuntimeError("out of memory")
        return run(batch)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(model.engine, "run", failing)
        model.encode(TEXTS * 3)
    np.testing.assert_array_equal(model.encode(TEXTS * 3), whole)


LONG = "a " * 40


@pytest.mark.parametrize("window", [2, 4, 100])
@pytest.mark.parametrize(
    ("inputs", "options", "error", "index", "message"),
    [
        (["a"] * 5 + [LONG, "b"], {"truncate": False}, InputTooLongError, 5, r"input\[5\] has 42 tokens"),
        ([[5]] * 5 + [[5] * 33], {"truncate": False}, InputTooLongError, 5, r"input\[5\] has 33 tokens"),
        (["a"] * 6 + ["\ud800"], {}, InputTypeError, 6, r"input\[6\] holds half of a surrogate"),
        ([[5]] * 4 + [[5, 64]], {}, TokenIdError, 4, r"input\[4\]\[1\] is the token id 64"),
        ([[5]] * 3 + [[]], {}, InputError, 3, r"input\[3\] is empty"),
        ([[5]] * 5 + [[5.5]], {}, InputTypeError, 5, r"input\[5\] must be a list of integers"),
        ([LONG, "a"], {"truncate": False}, InputTooLongError, 0, r"input\[0\] has 42 tokens"),
    ],
)
def test_errors_name_the_item_in_any_window(
    model: Embedder,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    inputs: Any,
    options: dict[str, Any],
    error: type[InputError],
    index: int,
    message: str,
) -> None:
    """Counted from the start of the whole input, in the message and in the attribute."""
    monkeypatch.setattr(runner, "WINDOW", window)
    with pytest.raises(error, match=message) as caught:
        model.encode(inputs, **options)
    assert caught.value.index == index


def test_long_texts_are_cut_unless_told_otherwise(model: Embedder) -> None:
    """To `max_length`; a text of just that length is no error."""
    assert model.max_length == 32
    np.testing.assert_allclose(model.encode(LONG), model.encode("a " * 30), atol=1e-6)
    np.testing.assert_allclose(model.encode("a " * 30, truncate=False), model.encode(LONG), atol=1e-6)


@pytest.mark.parametrize(
    "inputs",
    [None, 5, 1.5, True, {"a": 1}, {"a"}, iter(["a"]), b"abc", object()],
    ids=lambda inputs: type(inputs).__name__,
)
def test_what_is_no_input_at_all(model: Embedder, inputs: Any) -> None:
    """The message says what would be one. Bytes are no list of token ids."""
    with pytest.raises(InputTypeError, match=f"not {type(inputs).__name__}"):
        model.encode(inputs)


@pytest.mark.parametrize(
    ("inputs", "index", "message"),
    [
        (["a", 5], 1, "must be a string, not int"),
        (["a", None], 1, "must be a string, not NoneType"),
        (["a", ["b"]], 1, "must be a string, not list"),
        (["a", b"b"], 1, "must be a string, not bytes"),
        ([[5], "a"], 1, "must be a list of token ids, not str"),
        ([[5], 6], 1, "must be a list of token ids, not int"),
        ([5, [6]], 0, "must be a list of token ids, not int"),
        ([5, "a"], 0, "must be a list of token ids, not int"),
        ([5, 1.5], 0, "must be a list of token ids, not int"),
        ([1.5], 0, "must be a list of token ids, not float"),
        ([True, False], 0, "must be a list of token ids, not bool"),
        ([5, True], 0, "must be a list of token ids, not int"),
        ([None], 0, "must be a list of token ids, not NoneType"),
        ([[5], [True]], 1, "must be a list of integers"),
        ([[5], ["a"]], 1, "must be a list of integers"),
        ([[5], b"ab"], 1, "must be a list of"),
        ([[[5]]], 0, "must be a list of integers"),
        (np.array([1.0, 2.0]), 0, "must be a list of integers"),
        (np.array([[1.0], [2.0]]), 0, "must be a list of integers"),
        (np.array(["a", 5], object), 1, "must be a string, not int"),
    ],
    ids=repr,
)
def test_mixtures_and_wrong_items(model: Embedder, inputs: Any, index: int, message: str) -> None:
    """The first wrong item is named, with its type."""
    with pytest.raises(InputTypeError, match=re.escape(f"input[{index}] {message}")) as caught:
        model.encode(inputs)
    assert caught.value.index == index


def test_from_pretrained_refuses(saved: tuple[SentenceTransformer, Path], tmp_path: Path) -> None:
    """Errors of the floors below come through as they are."""
    with pytest.raises(CheckpointNotFoundError):
        Embedder.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype is 'float64'"):
        Embedder.from_pretrained(saved[1], dtype="float64")
    with pytest.raises(ValueError, match="max_length is 33"):
        Embedder.from_pretrained(saved[1], max_length=33)


def test_threads_share_one_model(model: Embedder) -> None:
    """Each gets its own vectors."""
    expected = model.encode(TEXTS)

    def run(start: int) -> float:
        order = [(start + i) % len(TEXTS) for i in range(len(TEXTS))]
        return float(np.abs(model.encode([TEXTS[i] for i in order]) - expected[order]).max())

    with ThreadPoolExecutor(6) as pool:
        assert max(pool.map(run, range(24))) <= 1e-6


@pytest.fixture(scope="module")
def batch() -> tuple[np.ndarray, np.ndarray]:
    """Token ids and a mask with padding in it."""
    ids = np.random.default_rng(4).integers(5, 62, (3, 8), np.int32)
    return ids, np.arange(8)[None, :] < np.array([[8], [3], [1]])


def test_apply_is_encode(model: Embedder, batch: tuple[np.ndarray, np.ndarray]) -> None:
    """Under jit, with a mask of truth values or of numbers."""
    ids, mask = batch
    expected = model.encode([row[keep] for row, keep in zip(ids, mask, strict=True)])
    compute = jax.jit(model.apply)
    np.testing.assert_allclose(compute(model.params, ids, mask), expected, atol=1e-6)
    np.testing.assert_allclose(compute(model.params, ids, mask.astype(np.int32)), expected, atol=1e-6)


def test_apply_under_vmap(model: Embedder, batch: tuple[np.ndarray, np.ndarray]) -> None:
    """Over rows one by one, and over weights: two models at once."""
    ids, mask = map(jnp.asarray, batch)
    expected = jax.jit(model.apply)(model.params, ids, mask)
    each = jax.jit(jax.vmap(lambda i, m: model.apply(model.params, i[None], m[None])[0]))(ids, mask)
    np.testing.assert_allclose(each, expected, atol=1e-6)
    both = {path: jnp.stack([leaf, 2 * leaf]) for path, leaf in model.params.items()}
    first, second = jax.jit(jax.vmap(model.apply, in_axes=(0, None, None)))(both, ids, mask)
    np.testing.assert_allclose(first, expected, atol=1e-6)
    assert np.abs(second - expected).max() > 1e-2


def test_the_gradient_is_torch_s(
    model: Embedder, theirs: SentenceTransformer, batch: tuple[np.ndarray, np.ndarray]
) -> None:
    """Of a weighted sum of the vectors, for every parameter, through pooling and norm."""
    ids, mask = batch
    weights = np.random.default_rng(5).normal(size=(3, WIDTH)).astype(np.float32)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return (model.apply(params, jnp.asarray(ids), jnp.asarray(mask)) * weights).sum()

    got = jax.jit(jax.grad(loss))(model.params)
    theirs.eval()
    theirs.zero_grad()
    features = {
        "input_ids": torch.from_numpy(ids.astype(np.int64)),
        "attention_mask": torch.from_numpy(mask.astype(np.int64)),
    }
    (theirs(features)["sentence_embedding"] * torch.from_numpy(weights)).sum().backward()
    expected = dict(theirs[0].model.named_parameters())
    largest = 0.0
    for path, gradient in got.items():
        weight = checkpoint_name(model.model.architecture, model.model.architecture.weights, path)
        want = expected[weight.name].grad.numpy()
        np.testing.assert_allclose(gradient, want, atol=1e-5, err_msg=path)
        largest = max(largest, float(np.abs(want).max()))
    assert len(got) == len(model.params)
    assert largest > 0.1


def test_a_ladder_shorter_than_the_model_is_the_limit(tiny_folder: Path) -> None:
    """Texts are cut to what was compiled, or refused by that number; never a shape that is not there."""
    short = Embedder.from_pretrained(tiny_folder, ladder=Ladder([Bucket(1, 8)]), mesh=make_mesh(jax.devices()[:1]))
    assert short.max_length == 8
    assert np.isfinite(short.encode("a b c d e f g h i j k l")).all()
    with pytest.raises(InputTooLongError, match="at most 8"):
        short.encode("a b c d e f g h i j k l", truncate=False)
