"""Vectors of tokens and MaxSim against sentence-transformers' MultiVectorEncoder, PyLate's and Stanford's folders."""

import json
import logging
import shutil
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from parity import SIZES, TOLERANCE, randomise, save_checkpoint, small_tokenizer, tiny_bert
from safetensors.torch import load_file, save_file
from sentence_transformers import MultiVectorEncoder, SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling, MultiVectorMask
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util.similarity import maxsim, mean_maxsim
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedTokenizerFast

from jaxembed import Bucket, Embedder, Ladder, late_interaction, make_mesh
from jaxembed.errors import (
    CorruptCheckpointError,
    DimensionsError,
    InputError,
    InputTooLongError,
    InputTypeError,
    PromptNameError,
    TaskNameError,
    UnsupportedModelError,
)
from jaxembed.late_interaction import UNATTENDED, max_similarity
from jaxembed.loading import load as load_model
from jaxembed.tokens import Tokens

TEXTS = ["a b c", "", "hello, world!", "x. y; [UNK] z", "0 1 2 3 4 5 6", "[MASK] a [CLS]", "a, b. " * 20, "one"]
LETTERS = 80
"""Entries of the vocabulary below."""
PROMPTS = {"query": "q: ", "document": "d: "}
Record = Callable[[str, object], None]


def tokenizer(folder: Path, *more: str) -> Path:
    """The small tokenizer with punctuation and ColBERT's markers, saved into a folder; `more` are added tokens."""
    plain = small_tokenizer()
    content = json.loads(plain.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    for piece in (*".,;:!", "[unused0]", "[unused1]"):
        vocab.setdefault(piece, len(vocab))
    names = {name: str(token) for name, token in plain.special_tokens_map.items()}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)
    if more:
        made.add_tokens(list(more))
    made.save_pretrained(folder)
    return folder


def transformer(folder: Path, hf_model: Any = None, **options: Any) -> Transformer:
    """A tiny BERT as sentence-transformers holds it."""
    hf_model = tiny_bert(vocab_size=LETTERS) if hf_model is None else hf_model
    hf_model.save_pretrained(folder / "hf")
    return Transformer(str(tokenizer(folder / "hf")), **options)


def dense(width: int = 16, size: int = 6, seed: int = 1, **options: Any) -> Dense:
    """A projection of tokens, linear unless asked otherwise."""
    torch.manual_seed(seed)  # torch begins biases at random; `randomise` adds to them
    options = {"bias": False, "activation_function": nn.Identity(), "module_input_name": "token_embeddings", **options}
    return randomise(Dense(width, size, **options), seed)


def native(
    folder: Path,
    *,
    hf_model: Any = None,
    mask: Mapping[str, Any] | None = None,
    behind: Iterable[nn.Module] | None = None,
    prompts: Mapping[str, str] = PROMPTS,
    measure: str | None = None,
    **options: Any,
) -> MultiVectorEncoder:
    """A folder as sentence-transformers itself saves one: projection, mask, norm, unless `behind` says otherwise."""
    if behind is None:
        behind = (dense(), MultiVectorMask(**mask or {}), Normalize("token_embeddings"))
    chain = [transformer(folder, hf_model, **options), *behind]
    model = MultiVectorEncoder(modules=chain, prompts=dict(prompts), similarity_fn_name=measure, device="cpu")
    model.save(str(folder), create_model_card=False)
    return model


def load(folder: Path, *buckets: tuple[int, int], **options: Any) -> Embedder:
    """On one device, with a single bucket, a flat one, unless others are asked for."""
    ladder = Ladder([Bucket(*bucket) for bucket in buckets or ((8, 32, 96),)])
    return Embedder.from_pretrained(folder, ladder=ladder, mesh=make_mesh(jax.devices()[:1]), **options)


def compare(ours: Embedder, theirs: MultiVectorEncoder, texts: Sequence[str] = TEXTS, **options: Any) -> float:
    """The worst difference, after checking it and the number of vectors, for queries, documents and neither."""
    methods = {"query": theirs.encode_query, "document": theirs.encode_document, None: theirs.encode}
    worst = 0.0
    for task, method in methods.items():
        got, want = (
            ours.encode_tokens(texts, task=task, **options),
            method(list(texts), convert_to_numpy=True, **options),
        )
        assert [one.shape for one in got] == [one.shape for one in want], task
        assert all(one.dtype == np.float32 for one in got)
        differences = [float(np.abs(a - b).max()) for a, b in zip(got, want, strict=True) if a.size]
        worst = max(worst, *differences)
        assert worst <= TOLERANCE, f"{task}: {differences}"
    return worst


FIXED = {"strategy": "fixed", "length": 12}
LEAST = {"strategy": "min", "length": 12}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_expansion": FIXED},
        {"query_expansion": FIXED | {"attend": True}},
        {"query_expansion": FIXED | {"token": "x"}, "query_length": 20},
        {"query_expansion": LEAST},
        {"query_expansion": LEAST | {"attend": True}, "query_length": 14, "document_length": 20},
        {"query_expansion": FIXED | {"length": 32}},
        {"query_length": 5, "document_length": 7},
        {"query_length": 32, "document_length": 32, "processing_kwargs": {"text": {"max_length": 9}}},
        {"query_expansion": LEAST, "processing_kwargs": {"text": {"max_length": 9}}},
    ],
    ids=str,
)
def test_lengths_and_expansion(options: dict[str, Any], tmp_path: Path, record_property: Record) -> None:
    """What sentence_bert_config.json says of them, with prompts on both sides."""
    theirs = native(tmp_path, mask={"skiplist_words": list(string.punctuation)}, **options)
    worst = compare(load(tmp_path), theirs)
    record_property("max abs diff", f"{worst:.1e}")


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"skiplist_words": ["a", ",", "[CLS]"]},
        {"skiplist_words": [",", "nosuchword", "[UNK]"]},
        {"skiplist_words": ["a", "[MASK]"], "skiplist_tasks": ["query", "document"]},
        {"skiplist_words": ["a"], "skiplist_tasks": "query"},
        {"keep_only_token_ids": [2, 5, 6, 63]},
        {"skiplist_words": ["b"], "keep_only_token_ids": [5, 6]},
    ],
    ids=str,
)
def test_the_tokens_left_out(mask: dict[str, Any], tmp_path: Path) -> None:
    """MultiVectorMask, with queries expanded."""
    theirs = native(tmp_path, mask=mask, query_expansion=FIXED)
    compare(load(tmp_path), theirs)


def test_words_that_are_no_tokens_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They cannot be left out; the unknown token, which they would be read as, is not."""
    native(tmp_path, mask={"skiplist_words": [",", "nosuchword"]})
    with caplog.at_level(logging.WARNING, late_interaction.__name__):
        load(tmp_path)
    assert "nosuchword" in caplog.text


CHAINS: Mapping[str, Callable[[], list[nn.Module]]] = {
    "bias, activation, residual": lambda: [
        dense(16, 8, bias=True, activation_function=nn.Tanh(), use_residual=True),
        dense(8, 8, 2, use_residual=True),
        MultiVectorMask(["a"]),
        Normalize("token_embeddings"),
    ],
    "norm before mask": lambda: [dense(), Normalize("token_embeddings"), MultiVectorMask(["a"])],
    "norm in the middle": lambda: [Normalize("token_embeddings"), dense(), MultiVectorMask()],
    "no norm": lambda: [dense(), MultiVectorMask(["a"])],
    "no projection": lambda: [MultiVectorMask(["a"]), Normalize("token_embeddings")],
    "no mask": lambda: [dense(), Normalize("token_embeddings")],
}


@pytest.mark.parametrize("attend", [False, True])
@pytest.mark.parametrize("chain", CHAINS)
def test_other_chains(chain: str, attend: bool, tmp_path: Path) -> None:
    """Without a mask, tokens that attention does not see count nowhere."""
    theirs = native(tmp_path, behind=CHAINS[chain](), query_expansion=FIXED | {"attend": attend})
    compare(load(tmp_path), theirs)


def test_prompts(tmp_path: Path) -> None:
    """Each side has its own or none; the default one is for texts of no side; a prompt asked for wins."""
    theirs = native(tmp_path, prompts={"query": "q: ", "passage": "p: ", "other": "o: "}, query_expansion=FIXED)
    extra = tmp_path / "config_sentence_transformers.json"
    extra.write_text(json.dumps({**json.loads(extra.read_text()), "default_prompt_name": "other"}))
    theirs, ours = MultiVectorEncoder(str(tmp_path), device="cpu"), load(tmp_path)
    for options in ({}, {"prompt_name": "passage"}, {"prompt": "x "}, {"prompt": ""}):
        compare(ours, theirs, **options)
    with pytest.raises(PromptNameError, match="nothing"):
        ours.encode_tokens("a", prompt_name="nothing")


def test_routes(tmp_path: Path) -> None:
    """Encoders of their own for the two sides, and only one of them expands."""
    sides = [
        [transformer(tmp_path / "q", query_expansion=FIXED), dense()],
        [transformer(tmp_path / "d", tiny_bert(seed=3, vocab_size=LETTERS), document_length=9), dense(seed=4)],
    ]
    router = Router.for_query_document(*sides)
    behind = [MultiVectorMask([","]), Normalize("token_embeddings")]
    theirs = MultiVectorEncoder(modules=[router, *behind], prompts=PROMPTS, device="cpu")
    theirs.save(str(tmp_path / "whole"), create_model_card=False)
    ours = load(tmp_path / "whole")
    for task, method in (("query", theirs.encode_query), ("document", theirs.encode_document)):
        for got, want in zip(ours.encode_tokens(TEXTS, task=task), method(TEXTS, convert_to_numpy=True), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


PYLATE = {
    "__version__": {"sentence_transformers": "3.4.1", "transformers": "4.48.2", "pytorch": "2.5.1"},
    "prompts": {},
    "default_prompt_name": None,
    "similarity_fn_name": "MaxSim",
    "query_prefix": "[Q] ",
    "document_prefix": "[D] ",
    "query_length": 12,
    "document_length": 20,
    "attend_to_expansion_tokens": False,
    "skiplist_words": [",", "."],
}


def pylate(folder: Path, *added: str, without: Sequence[str] = (), **changes: Any) -> Path:
    """A folder as PyLate writes one, by hand: no modules for mask and norm, and lengths of its own."""
    tiny_bert(vocab_size=LETTERS).save_pretrained(folder)
    tokenizer(folder, *added)
    types = ["sentence_transformers.models.Transformer", "pylate.models.Dense.Dense"]
    modules = [{"idx": i, "name": str(i), "path": ["", "1_Dense"][i], "type": kind} for i, kind in enumerate(types)]
    projection = {"in_features": 16, "out_features": 6, "bias": False}
    extra = {key: value for key, value in (PYLATE | changes).items() if key not in without}
    files = {
        "modules.json": modules,
        "sentence_bert_config.json": {"max_seq_length": 19, "do_lower_case": False},
        "config_sentence_transformers.json": extra,
        "1_Dense/config.json": {**projection, "activation_function": "torch.nn.modules.linear.Identity"},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    save_file({"linear.weight": dense().linear.weight.data.contiguous()}, folder / "1_Dense" / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("added", "without", "changes"),
    [
        ((), (), {}),
        (("[Q] ", "[D] "), (), {}),
        (("[Q]", "[D]"), (), {"model_type": "ColBERT"}),
        ((), (), {"query_prefix": "[unused0]", "document_prefix": "[unused1]", "attend_to_expansion_tokens": True}),
        ((), ("skiplist_words", "query_length", "document_length"), {"model_type": "ColBERT"}),
        ((), (), {"do_query_expansion": False, "query_prefix": "", "document_prefix": None}),
        ((), ("skiplist_words",), {"do_query_expansion": True, "prompts": {"query": "[Q] find ", "document": "text "}}),
        ((), (), {"document_length": 300, "skiplist_words": []}),
        ((), ("query_prefix", "document_prefix"), {"query_expansion": None}),
        ((), (), {"query_expansion": LEAST, "query_length": 15}),
    ],
    ids=str,
)
def test_pylate(added: tuple[str, ...], without: Sequence[str], changes: dict[str, Any], tmp_path: Path) -> None:
    """All that it writes into config_sentence_transformers.json, with markers that are tokens and that are text."""
    folder = pylate(tmp_path, *added, without=without, **changes)
    # With no length given it is 32 for queries, which is all that these 32 positions hold.
    ours, theirs = load(folder), MultiVectorEncoder(str(folder), device="cpu")
    cut = [text for text in TEXTS if len(text) < 40] if "document_length" in changes else TEXTS
    compare(ours, theirs, cut)


def test_a_document_length_beyond_the_positions(tmp_path: Path) -> None:
    """Texts are cut to what the model has room for."""
    ours = load(pylate(tmp_path, document_length=300))
    assert len(ours.encode_tokens("a " * 400, task="document")) == 32
    assert len(ours.encode_tokens("a " * 400)) == 19


def test_pylate_beside_the_weights_of_stanford(tmp_path: Path) -> None:
    """Both kinds of files in one folder (answerai-colbert-small-v1): it is PyLate's, masked and normalised."""
    plain = pylate(tmp_path / "plain")
    both = shutil.copytree(plain, tmp_path / "both")
    config = json.loads((both / "config.json").read_text())
    (both / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    (both / "artifact.metadata").write_text(json.dumps({"query_maxlen": 5}))
    weights = load_file(both / "model.safetensors")
    save_file(
        {**{f"bert.{k}": v for k, v in weights.items()}, "linear.weight": torch.zeros(3, 16)},
        both / "model.safetensors",
    )
    compare(load(both), MultiVectorEncoder(str(plain), device="cpu"))


def stanford(folder: Path, metadata: Mapping[str, Any] | None, **more: torch.Tensor) -> Path:
    """A folder as Stanford's ColBERT writes one: BERT and the projection in one file, settings in artifact.metadata."""
    bert = tiny_bert(vocab_size=LETTERS)
    bert.save_pretrained(folder)
    tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["HF_ColBERT"]}))
    if metadata is not None:
        (folder / "artifact.metadata").write_text(json.dumps(metadata))
    weights = {f"bert.{name}": value.contiguous() for name, value in bert.state_dict().items()}
    save_file({**weights, "linear.weight": dense().linear.weight.data, **more}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        None,
        {
            "query_maxlen": 12,
            "doc_maxlen": 20,
            "attend_to_mask_tokens": False,
            "mask_punctuation": True,
            "query_token_id": "[unused0]",
            "doc_token_id": "[unused1]",
            "similarity": "cosine",
            "dim": 6,
        },
        {"query_maxlen": 14, "attend_to_mask_tokens": True, "mask_punctuation": False},
        {"query_maxlen": 14, "query_token_id": "a", "doc_token_id": "[D]"},
    ],
    ids=str,
)
def test_stanford(metadata: dict[str, Any] | None, tmp_path: Path) -> None:
    """The markers are tokens of the vocabulary, and punctuation is left out unless it says otherwise."""
    folder = stanford(tmp_path, metadata)
    ours = load(folder)
    compare(ours, MultiVectorEncoder(str(folder), device="cpu"))
    assert ours.dimension == 6
    assert ours.params["linear.kernel"].shape == (6, 16)


GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
ARCHITECTURES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "albert": ("Albert", {"embedding_size": 8}),
    "bert": ("Bert", {}),
    "distilbert": ("DistilBert", {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 40}),
    "electra": ("Electra", {"embedding_size": 8}),
    "ernie": ("Ernie", {}),
    "eurobert": ("EuroBert", {"pad_token_id": 0}),
    "gemma3_text": ("Gemma3Text", {**GROUPED, "use_bidirectional_attention": True, "sliding_window": 6}),
    "gte": ("Gte", {}),
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 4}),
    "modernbert": ("ModernBert", {"local_attention": 4, "num_hidden_layers": 4, "pad_token_id": 0}),
    "mpnet": ("MPNet", {"pad_token_id": 1}),
    "nomic_bert": ("NomicBert", {}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED),
    "roberta": ("XLMRoberta", {"pad_token_id": 1}),
    "t5": ("T5Encoder", {"d_model": 16, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 2}),
}


@pytest.mark.parametrize("name", UNATTENDED)
def test_tokens_that_attention_does_not_see(name: str, tmp_path: Path, record_property: Record) -> None:
    """Their hidden states are the original's in every architecture that says so, in a bucket of any length.

    Windows are so narrow that some of these tokens see nothing at all. Attention is torch's, as it is by default.
    """
    family, more = ARCHITECTURES[name]
    sizes = {"vocab_size": 64} if name == "t5" else SIZES
    config = getattr(transformers, f"{family.removesuffix('Encoder')}Config")(**sizes | more)
    hf_model = randomise(getattr(transformers, f"{family}Model")(config), 0)
    model = load_model(save_checkpoint(hf_model, tmp_path), mesh=make_mesh(jax.devices()[:1]))
    assert model.architecture.model_type == name
    lengths, width = np.array([3, 7, 20, 1]), 20
    ids = np.random.default_rng(0).integers(5, 64, (len(lengths), width), np.int32)
    mask = np.arange(width)[None, :] < lengths[:, None]
    with torch.no_grad():
        want = hf_model(torch.from_numpy(ids).long(), torch.from_numpy(mask).long()).last_hidden_state.numpy()
    for bucket in (width, 28):
        behind = ((0, 0), (0, bucket - width))
        tokens = Tokens.plain(*(jax.numpy.asarray(np.pad(array, behind)) for array in (ids, mask)))
        got = jax.jit(lambda leaves, tokens: model.encoder(leaves).hidden_states(tokens)[-1])(model.leaves, tokens)
        worst = float(np.abs(np.asarray(got)[:, :width] - want).max())
        assert worst <= TOLERANCE
        record_property(f"max abs diff in {bucket}", f"{worst:.1e}")


def test_modernbert(tmp_path: Path) -> None:
    """A whole model with windows narrower than its expanded queries."""
    config = transformers.ModernBertConfig(
        **SIZES | {"vocab_size": LETTERS, "local_attention": 4, "num_hidden_layers": 4, "pad_token_id": 0}
    )
    theirs = native(
        tmp_path, hf_model=randomise(transformers.ModernBertModel(config), 0), query_expansion=FIXED | {"length": 20}
    )
    compare(load(tmp_path), theirs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with queries of 12 tokens, documents of 20 and no text longer than 32."""
    folder = tmp_path_factory.mktemp("late")
    native(folder, mask={"skiplist_words": list(".,")}, query_expansion=FIXED, document_length=20)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Embedder:
    """It, on one device."""
    return load(folder)


def test_alone_as_in_a_batch_and_in_any_bucket(folder: Path, ours: Embedder) -> None:
    """Also over several devices."""
    many = Embedder.from_pretrained(folder, ladder=Ladder([Bucket(8, 32), Bucket(16, 16)]))
    for other in (load(folder, (1, 12), (2, 16), (1, 32)), many):
        for task in ("query", "document"):
            together = ours.encode_tokens(TEXTS, task=task)
            for text, want, batched in zip(TEXTS, together, other.encode_tokens(TEXTS, task=task), strict=True):
                alone = other.encode_tokens(text, task=task)
                np.testing.assert_allclose(alone, want, rtol=0, atol=1e-6)
                np.testing.assert_allclose(batched, want, rtol=0, atol=1e-6)


def test_one_input_and_none(ours: Embedder) -> None:
    """A single text gives its array; an empty list, an empty one."""
    assert ours.encode_tokens("a", task="query").shape == (12, 6)
    assert ours.encode_tokens([]) == []


def test_results_hold_no_batch(ours: Embedder) -> None:
    """What is returned is as large as it looks."""
    for one in ours.encode_tokens(TEXTS, task="document"):
        assert one.base is None or one.base.size == one.size


def test_token_ids(ours: Embedder) -> None:
    """No prompt and no special tokens; as queries they are expanded, as documents masked."""
    ids = [2, 5, 6, 3]
    same = ours.encode_tokens("a b", task="query", prompt="")
    np.testing.assert_allclose(ours.encode_tokens(ids, task="query"), same, rtol=0, atol=1e-6)
    comma = ours.tokenizer.token_id(",")
    assert ours.encode_tokens([ids, [2, comma, 5, comma]], task="document")[1].shape == (2, 6)
    assert ours.encode_tokens([comma], task="document").shape == (0, 6)
    assert ours.encode_tokens([[5] * 50], task="query")[0].shape == (12, 6)


def test_cut_and_normalised(ours: Embedder) -> None:
    """Unit vectors of any size; and what they were made of."""
    whole = ours.encode_tokens("a b c", normalize=False)
    for size in (6, 3):
        unit = whole[:, :size] / np.linalg.norm(whole[:, :size], axis=1, keepdims=True)
        np.testing.assert_allclose(ours.encode_tokens("a b c", dimensions=size), unit, rtol=0, atol=1e-6)
    assert np.abs(np.linalg.norm(whole, axis=1) - 1).max() > 1e-2


LONG = "a " * 40


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (LONG, {"task": "query", "truncate": False}, InputTooLongError, r"input\[0\] has 44 tokens.* at most 12"),
        (
            ["a", "b " * 20],
            {"task": "document", "truncate": False},
            InputTooLongError,
            r"input\[1\] has 24.*at most 20",
        ),
        ([[5], [5] * 21], {"task": "document", "truncate": False}, InputTooLongError, r"input\[1\] has 21.*at most 20"),
        (LONG, {"truncate": False}, InputTooLongError, r"input\[0\] has 42 tokens.* at most 32"),
        ("a", {"task": "passage"}, TaskNameError, "passage"),
        ("a", {"dimensions": 7}, DimensionsError, "7; allowed: 1 to 6"),
        ("a", {"dimensions": 0}, DimensionsError, "0; allowed: 1 to 6"),
        (["a", 5], {}, InputTypeError, r"input\[1\] must be a string"),
        (None, {}, InputTypeError, "NoneType"),
        ([[5, 80]], {}, InputError, r"input\[0\]\[1\] is the token id 80"),
        ([[]], {}, InputError, r"input\[0\] is empty"),
    ],
    ids=str,
)
def test_wrong_inputs(ours: Embedder, inputs: Any, options: Any, error: type[Exception], message: str) -> None:
    """Each names what was given and what is allowed."""
    with pytest.raises(error, match=message):
        ours.encode_tokens(inputs, **options)


def test_no_single_vector(ours: Embedder) -> None:
    """What else is asked of such a model is refused by what it gives, and its measure is MaxSim."""
    with pytest.raises(UnsupportedModelError, match="it gives a vector for each token"):
        ours.encode("a")
    with pytest.raises(UnsupportedModelError, match=r"maxsim.*max_similarity"):
        ours.similarity([[1.0]], [[1.0]])


def test_a_shorter_length_asked_for(folder: Path) -> None:
    """Documents are cut to it; under the length of expanded queries nothing loads."""
    short = load(folder, max_length=16)
    assert len(short.encode_tokens(LONG, task="document")) == 16
    with pytest.raises(ValueError, match="max_length is 8; this model expands queries to 12 tokens"):
        load(folder, max_length=8)


def test_the_tokens_of_a_model_of_single_vectors(tmp_path: Path) -> None:
    """Its last hidden state, special tokens and all, as sentence-transformers gives it; with its prompts."""
    chain = [transformer(tmp_path), Pooling(16, "mean"), Dense(16, 5)]
    theirs = SentenceTransformer(modules=chain, prompts=PROMPTS, device="cpu")
    theirs.save(str(tmp_path), create_model_card=False)
    ours = load(tmp_path)
    for task, prompt in ((None, ""), ("query", "q: "), ("document", "d: ")):
        want = theirs.encode(TEXTS, prompt=prompt, output_value="token_embeddings")
        for got, one in zip(ours.encode_tokens(TEXTS, task=task), want, strict=True):
            np.testing.assert_allclose(got, one.numpy()[: len(got)], rtol=0, atol=TOLERANCE)
            assert len(got) == len(one)
    assert ours.encode_tokens("a", dimensions=16, normalize=True).shape == (3, 16)


def vectors(lengths: Sequence[int], seed: int = 0, size: int = 8) -> list[np.ndarray]:
    """Random arrays [t, size]."""
    random = np.random.default_rng(seed)
    return [random.standard_normal((length, size)).astype(np.float32) / 3 for length in lengths]


@pytest.mark.parametrize("chunk", [None, 1, 40, 300])
def test_max_similarity(chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sentence-transformers', however little memory it takes."""
    if chunk is not None:
        monkeypatch.setattr(late_interaction, "CHUNK", chunk)
    queries, documents = vectors([3, 1, 7, 2]), vectors([5, 11, 1, 4, 8], seed=1)
    tensors = [[torch.from_numpy(one) for one in side] for side in (queries, documents)]
    for mean, reference in ((False, maxsim), (True, mean_maxsim)):
        got = max_similarity(queries, documents, mean=mean)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, reference(*tensors).numpy(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("measure", [None, "maxsim", "meanmaxsim"])
def test_the_measure_of_a_model(measure: str | None, tmp_path: Path) -> None:
    """It is the folder's, on vectors of texts; one text alone is a list of one."""
    theirs = native(tmp_path, query_expansion=FIXED, measure=measure)
    ours = load(tmp_path)
    queries, documents = ours.encode_tokens(TEXTS, task="query"), ours.encode_tokens(TEXTS[::-1], task="document")
    got = ours.max_similarity(queries, documents)
    want = theirs.similarity(theirs.encode_query(TEXTS), theirs.encode_document(TEXTS[::-1])).numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(ours.max_similarity(queries[0], documents[1]), got[:1, 1:2], rtol=0, atol=1e-6)
    stacked = np.stack([queries[0], queries[2]])
    np.testing.assert_allclose(ours.max_similarity(stacked, documents), got[[0, 2]], rtol=0, atol=1e-6)


def test_max_similarity_of_nothing() -> None:
    """A document without vectors is below every other; a query without any has no preference."""
    queries, documents = vectors([2, 0]), vectors([3, 0], seed=1)
    got = max_similarity(queries, documents)
    assert np.isfinite(got[0, 0]) and got[1, 0] == 0
    assert (got[:, 1] == -np.inf).all()
    np.testing.assert_array_equal(max_similarity(queries, documents, mean=True)[1], got[1])
    assert max_similarity([], documents).shape == (0, 2)
    assert max_similarity(queries, []).shape == (2, 0)


@pytest.mark.parametrize(
    ("queries", "documents", "error", "message"),
    [
        (vectors([2]), vectors([2], size=7), InputError, r"one size, not of \[7, 8\]"),
        ([np.zeros(3)], vectors([2]), InputTypeError, r"queries\[0\] must be .* not of shape \(3,\)"),
        (vectors([2]), [*vectors([2]), np.zeros((1, 2, 8))], InputTypeError, r"documents\[1\] must be"),
        ("text", vectors([2]), InputTypeError, "queries must be arrays .* not str"),
        (vectors([2]), None, InputTypeError, "documents must be arrays .* not NoneType"),
    ],
)
def test_max_similarity_of_something_else(queries: Any, documents: Any, error: type[Exception], message: str) -> None:
    """Each names the item."""
    with pytest.raises(error, match=message):
        max_similarity(queries, documents)


def changed(folder: Path, file: str, **changes: Any) -> Path:
    """The folder with changes in one of its files."""
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


SETTINGS = "sentence_bert_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "error", "message"),
    [
        (SETTINGS, {"query_expansion": {"strategy": "max", "length": 3}}, UnsupportedModelError, "'max'.*fixed or min"),
        (SETTINGS, {"query_expansion": {**FIXED, "new": 1}}, UnsupportedModelError, "'new'"),
        (SETTINGS, {"query_expansion": {"strategy": "fixed"}}, CorruptCheckpointError, "malformed"),
        (SETTINGS, {"query_expansion": FIXED | {"attend": 1}}, CorruptCheckpointError, "malformed"),
        (SETTINGS, {"query_expansion": FIXED | {"length": "12"}}, CorruptCheckpointError, "length of .* is '12'"),
        (SETTINGS, {"query_expansion": FIXED | {"token": "nosuch"}}, UnsupportedModelError, "tokenizer lacks 'nosuch'"),
        (SETTINGS, {"query_length": 5}, UnsupportedModelError, "query_length is 5, less than the 12"),
        (SETTINGS, {"document_length": 0}, CorruptCheckpointError, "document_length is 0"),
        ("2_MultiVectorMask/config.json", {"skiplist_words": "a"}, CorruptCheckpointError, "skiplist_words is 'a'"),
        (
            "2_MultiVectorMask/config.json",
            {"keep_only_token_ids": ["a"]},
            CorruptCheckpointError,
            "keep_only_token_ids",
        ),
        (SETTINGS, {"processor_kwargs": {"padding_side": "left"}}, UnsupportedModelError, "expanded on the left"),
        ("tokenizer_config.json", {"padding_side": "left"}, UnsupportedModelError, "pads on the left"),
        ("tokenizer_config.json", {"mask_token": None}, UnsupportedModelError, "tokenizer lacks a mask token"),
    ],
    ids=str,
)
def test_refused_folders(
    folder: Path, file: str, changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    """What would compute something else does not load."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(error, match=message):
        load(changed(copy, file, **changes))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda: [HierarchicalTokenPooling(2)], "'HierarchicalTokenPooling'.* not supported"),
        (lambda: [Pooling(6, "mean")], "Pooling beside vectors of tokens"),
        (lambda: [MultiVectorMask(["b"])], "2 MultiVectorMask modules; supported: one"),
    ],
)
def test_refused_chains(more: Callable[[], list[nn.Module]], message: str, tmp_path: Path) -> None:
    """Modules that are not implemented, by name."""
    native(tmp_path, behind=[dense(), MultiVectorMask(["a"]), *more()])
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path)


def test_refused_architectures(tmp_path: Path) -> None:
    """DeBERTa's original masks the tokens that attention does not see wholly; seen, they are no matter."""
    config = transformers.DebertaV2Config(**SIZES | {"vocab_size": LETTERS, "relative_attention": True})
    hf_model = randomise(transformers.DebertaV2Model(config), 0)
    native(tmp_path / "unseen", hf_model=hf_model, query_expansion=FIXED)
    with pytest.raises(UnsupportedModelError, match="not proven for 'deberta-v2'; proven: albert"):
        load(tmp_path / "unseen")
    seen = native(tmp_path / "seen", hf_model=hf_model, query_expansion=FIXED | {"attend": True})
    compare(load(tmp_path / "seen"), seen)


def test_refused_folders_of_stanford(tmp_path: Path) -> None:
    """Another similarity, weights without the projection, weights that nobody asks for."""
    with pytest.raises(UnsupportedModelError, match="similarity 'l2'; supported: 'cosine'"):
        load(stanford(tmp_path / "l2", {"similarity": "l2"}))
    bare = stanford(tmp_path / "bare", {})
    weights = load_file(bare / "model.safetensors")
    save_file({name: value for name, value in weights.items() if name != "linear.weight"}, bare / "model.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"no matrix 'linear.weight'"):
        load(bare)
    with pytest.raises(Exception, match=r"linear\.bias"):
        load(stanford(tmp_path / "bias", {"query_maxlen": 12}, **{"linear.bias": torch.zeros(6)}))
