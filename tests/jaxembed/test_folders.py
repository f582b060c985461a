"""Whole sentence-transformers folders: `encode` here against `SentenceTransformer.encode` there."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from parity import cosines, save_checkpoint, save_sentence_transformer, tiny_bert
from sentence_transformers import SentenceTransformer

from jaxembed import Bucket, Embedder, Ladder, make_mesh
from jaxembed.types import PoolingMode

MIN_COSINE = 0.999999
TEXTS = [
    "a b c",
    "",
    "hello world",
    "   white \t space\n kept ",
    "UPPER Case é",
    "[SEP] written out",
    "x y z " * 20,
    "0 1 2 3 4 5 6",
    "one",
]
PROMPTS = {"query": "query: ", "document": "a text: "}


def load(folder: Path) -> Embedder:
    """On one device, with a single bucket: these tests are not about buckets."""
    return Embedder.from_pretrained(folder, ladder=Ladder([Bucket(8, 32)]), mesh=make_mesh(jax.devices()[:1]))


def compare(ours: Embedder, theirs: SentenceTransformer, texts: list[str] = TEXTS, **options: Any) -> float:
    """The least cosine, after checking it and the lengths of the vectors."""
    got, want = ours.encode(texts, **options), theirs.encode(texts, **options)
    assert got.shape == want.shape
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), np.linalg.norm(want, axis=1), rtol=1e-5)
    least = float(cosines(got, want).min())
    assert least >= MIN_COSINE
    return least


@pytest.mark.parametrize(
    ("modes", "normalize"),
    [
        (["cls"], True),
        (["max"], True),
        (["mean"], True),
        (["mean"], False),
        (["mean_sqrt_len_tokens"], False),
        (["weightedmean"], True),
        (["lasttoken"], True),
        (["lasttoken", "cls"], False),
        ([mode.value for mode in PoolingMode], True),
    ],
    ids=str,
)
def test_saved_by_sentence_transformers(
    modes: list[str], normalize: bool, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Every mode, with Normalize and without, in the form that 6.2 writes."""
    theirs = save_sentence_transformer(
        tiny_bert(num_hidden_layers=1), tmp_path, modes=modes, normalize=normalize, prompts=PROMPTS
    )
    ours = load(tmp_path)
    assert ours.dimension == 16 * len(modes)
    assert ours.max_length == 32
    least = min(compare(ours, theirs, prompt_name=name) for name in (None, "query", "document"))
    record_property("1 - min cosine", f"{1 - least:.1e}")


@pytest.mark.parametrize("modes", [["mean"], ["cls", "max", "weightedmean"]], ids=str)
def test_prompts_left_out_of_pooling(modes: list[str], tmp_path: Path) -> None:
    """`include_prompt: false`, with prompts short and long, of text and of special tokens."""
    theirs = save_sentence_transformer(
        tiny_bert(num_hidden_layers=1, max_position_embeddings=24),
        tmp_path,
        modes=modes,
        include_prompt=False,
        prompts=PROMPTS,
        default_prompt_name="query",
    )
    ours = load(tmp_path)
    compare(ours, theirs)
    for prompt in ("", "b ", "b c d ", "[SEP] x ", "b " * 15):
        compare(ours, theirs, prompt=prompt)


def test_a_prompt_longer_than_the_model_takes(tmp_path: Path) -> None:
    """Left out of pooling, it leaves the trailing special token, not nothing."""
    theirs = save_sentence_transformer(tiny_bert(num_hidden_layers=1), tmp_path, include_prompt=False)
    compare(load(tmp_path), theirs, prompt="b " * 50)


def test_a_default_prompt_and_the_two_tasks(tmp_path: Path) -> None:
    """`encode`, `encode_query` and `encode_document` choose the same prompts."""
    prompts = {"query": "q ", "corpus": "c ", "passage": "p ", "other": "o "}
    theirs = save_sentence_transformer(
        tiny_bert(num_hidden_layers=1), tmp_path, prompts=prompts, default_prompt_name="other"
    )
    ours = load(tmp_path)
    vectors = []
    for name in ("encode", "encode_query", "encode_document"):
        got, want = getattr(ours, name)(TEXTS), getattr(theirs, name)(TEXTS)
        assert cosines(got, want).min() >= MIN_COSINE
        vectors.append(got)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2
    assert np.abs(vectors[1] - vectors[2]).max() > 1e-2


OLD_POOLING = {
    "word_embedding_dimension": 16,
    "pooling_mode_cls_token": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": False,
}


def old_folder(folder: Path, pooling: Mapping[str, Any], sentence: Mapping[str, Any], *, normalize: bool) -> Path:
    """A folder as sentence-transformers up to 5 wrote it, by hand."""
    save_checkpoint(tiny_bert(num_hidden_layers=1), folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    files = {
        "modules.json": [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{kind}" if i else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for i, kind in enumerate(kinds)
        ],
        "1_Pooling/config.json": {**OLD_POOLING, **pooling},
        "sentence_bert_config.json": sentence,
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": "2.0.0", "transformers": "4.6.1", "pytorch": "1.8.1"},
            "prompts": PROMPTS,
            "default_prompt_name": None,
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "true",
    [
        ["cls_token"],
        ["max_tokens"],
        ["mean_tokens"],
        ["mean_sqrt_len_tokens"],
        ["weightedmean_tokens"],
        ["lasttoken"],
        ["mean_tokens", "cls_token", "max_tokens"],
        [],
    ],
    ids=str,
)
def test_written_by_older_versions(true: list[str], tmp_path: Path) -> None:
    """The booleans of old, several at once, and none at all."""
    pooling = {f"pooling_mode_{name}": True for name in true}
    folder = old_folder(tmp_path, pooling, {"max_seq_length": 20, "do_lower_case": False}, normalize=len(true) != 1)
    ours, theirs = load(folder), SentenceTransformer(str(folder), device="cpu")
    assert ours.max_length == theirs.max_seq_length == 20
    compare(ours, theirs)
    compare(ours, theirs, prompt_name="query")


def test_an_old_folder_that_leaves_prompts_out(tmp_path: Path) -> None:
    """`include_prompt` among the booleans."""
    folder = old_folder(
        tmp_path, {"pooling_mode_mean_tokens": True, "include_prompt": False}, {"max_seq_length": 20}, normalize=False
    )
    ours, theirs = load(folder), SentenceTransformer(str(folder), device="cpu")
    for name in (None, "query", "document"):
        compare(ours, theirs, prompt_name=name)


def test_lower_case(tmp_path: Path) -> None:
    """`do_lower_case` with a tokenizer that keeps case: special tokens written in a text stay what they are."""
    folder = old_folder(
        tmp_path, {"pooling_mode_mean_tokens": True}, {"max_seq_length": 20, "do_lower_case": True}, normalize=False
    )
    save_checkpoint(tiny_bert(num_hidden_layers=1), folder, lowercase=False)
    ours, theirs = load(folder), SentenceTransformer(str(folder), device="cpu")
    compare(ours, theirs, [*TEXTS, "[MASK] A [CLS]", "ABC"])
    np.testing.assert_array_equal(ours.encode("ABC"), ours.encode("abc"))


def test_a_folder_of_transformers_alone(tmp_path: Path) -> None:
    """Without modules.json: mean pooling, not normalised, as sentence-transformers makes of it."""
    folder = save_checkpoint(tiny_bert(num_hidden_layers=1), tmp_path)
    compare(load(folder), SentenceTransformer(str(folder), device="cpu"))


def test_cut_vectors_are_unit_vectors_here(tmp_path: Path) -> None:
    """`truncate_dim` is the default size. There it cuts behind Normalize; here the norm comes last, as with OpenAI."""
    theirs = save_sentence_transformer(tiny_bert(num_hidden_layers=1), tmp_path, truncate_dim=6)
    extra = tmp_path / "config_sentence_transformers.json"
    extra.write_text(json.dumps({**json.loads(extra.read_text()), "truncate_dim": 6}))
    ours = load(tmp_path)
    got, cut = ours.encode(TEXTS), theirs.encode(TEXTS)
    assert got.shape == cut.shape == (len(TEXTS), 6)
    assert cosines(got, cut).min() >= MIN_COSINE
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    assert ours.encode(TEXTS, dimensions=16).shape == (len(TEXTS), 16)
