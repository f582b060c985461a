"""Loading what is served: routes, task adapters, and the models that are refused at the start."""

import dataclasses
import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from folders import save, tiny_transformer, write
from parity import TINY, randomise, save_checkpoint
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SparseEncoder
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from sentence_transformers.sparse_encoder.modules import SparseStaticEmbedding
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from jaxembed import Bucket, Embedder, Ladder, loading, make_mesh
from jaxembed.errors import UnsupportedModelError
from jaxembed.packing import Row, pack
from jaxembed_server.cli import main
from jaxembed_server.config import ServerConfig, from_sources
from jaxembed_server.model import Loaded, load_model

WIDTH = 16


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of executables is the process's: it stays the one of the session."""
    monkeypatch.setattr("jaxembed.warmup.use_cache", lambda folder: None)


def loaded(folder: Path, **settings: Any) -> Loaded:
    """What the server makes of a folder, and how far it says it is."""
    seen: list[tuple[int, int]] = []
    config = ServerConfig(model=str(folder), max_batch_tokens=32, **settings)
    found = load_model(config, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    return found


def vector(model: Loaded, text: str) -> np.ndarray:
    """A text through the tokenizer and the engine that are served."""
    encoding = model.tokenizer.encode_texts([text])[0]
    row = Row(encoding, model.engine.dimension, model.checkpoint.normalize, 0)
    bucket = model.engine.ladder.plan([len(encoding)])[0].bucket
    return model.engine.run(pack(bucket, [row]))[0]


def dense(seed: int, after: int) -> Dense:
    """A random Dense."""
    return randomise(Dense(WIDTH, after, activation_function=nn.Identity()), seed)


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two routes, of which the second is the default one."""
    folder = tmp_path_factory.mktemp("routed")
    first = tiny_transformer(folder / "hf", num_hidden_layers=1)
    router = Router.for_query_document([dense(1, 8)], [dense(2, 12), Normalize()])
    return save(folder / "model", [first, Pooling(WIDTH, "mean"), router])


@pytest.mark.parametrize(
    ("route", "dimension", "normalize"), [(None, 12, True), ("document", 12, True), ("query", 8, False)]
)
def test_one_route_is_served(route: str | None, dimension: int, normalize: bool, routed: Path) -> None:
    """The default one, or the one that is named; the others are not loaded."""
    found = loaded(routed, route=route)
    assert found.engine.dimension == dimension
    assert found.checkpoint.normalize == normalize
    want = Embedder.from_pretrained(routed).encode("a b c", task=route)
    np.testing.assert_allclose(vector(found, "a b c"), want, rtol=0, atol=1e-6)


def test_what_the_cache_has_need_not_be_there_at_once(tiny_folder: Path, cache: Path) -> None:
    """The first time every shape is compiled; then one row of each length is enough to begin with."""
    first = loaded(tiny_folder)
    assert first.buckets == first.engine.ladder.buckets
    assert first.engine.compiled == set(first.buckets)
    second = loaded(tiny_folder)
    assert second.buckets == first.buckets
    assert second.engine.ladder.buckets == first.engine.ladder.smallest().buckets
    assert second.engine.compiled == set(second.engine.ladder.buckets)
    np.testing.assert_array_equal(vector(second, "a b c"), vector(first, "a b c"))


def test_a_start_begins_with_what_an_earlier_one_chose(tiny_folder: Path, cache: Path) -> None:
    """If all of it is there, and shapes are chosen at all."""
    first = loaded(tiny_folder)
    chosen = first.engine.ladder.having([Bucket(8, 12), Bucket(16, 12), Bucket(8, 32)])
    first.engine.keep(chosen)
    assert loaded(tiny_folder).buckets == first.buckets
    first.engine.allow(chosen)
    for bucket in chosen.buckets:
        first.engine.compile(bucket)
    second = loaded(tiny_folder)
    assert second.buckets == chosen.buckets
    assert second.engine.ladder.buckets == chosen.smallest().buckets == (Bucket(8, 12), Bucket(8, 32))
    assert second.engine.compiled == set(second.engine.ladder.buckets)
    assert loaded(tiny_folder, refine_after=0).buckets == first.buckets


def test_a_process_beside_compiles_what_is_chosen(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the engine would; only what is in the cache afterwards can have come from there."""
    monkeypatch.setattr(loading, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    model = loaded(tiny_folder)
    chosen = Ladder([Bucket(1, 12), Bucket(1, 32)])
    assert not model.engine.cached(Bucket(1, 12))
    model.ahead(chosen)
    model.engine.allow(chosen)
    assert model.engine.compile(Bucket(1, 12)).cached


def test_collections_of_garbage_leave_it_out(tiny_folder: Path) -> None:
    """What is loaded stays, and to look through it takes a tenth of a second."""
    gc.unfreeze()
    loaded(tiny_folder)
    assert gc.get_freeze_count() > len(gc.get_objects())


def test_a_route_must_be_there(routed: Path, tiny_folder: Path) -> None:
    """The message names the setting, its value and what is allowed."""
    with pytest.raises(ValueError, match="--route is 'other'; allowed: query, document"):
        loaded(routed, route="other")
    with pytest.raises(ValueError, match="--route is 'query', but this model has no routes"):
        loaded(tiny_folder, route="query")


def test_a_route_must_be_named_where_there_is_no_default(routed: Path, tmp_path: Path) -> None:
    """Texts of no task would be refused, and requests name none."""
    write(tmp_path, {str(p.relative_to(routed)): p.read_bytes() for p in routed.rglob("*") if p.is_file()})
    name = "2_Router/router_config.json"
    config = json.loads((tmp_path / name).read_text())
    config["parameters"] |= {"default_route": None, "allow_empty_key": False}
    write(tmp_path, {name: config})
    with pytest.raises(ValueError, match="has no default route: choose one with --route; allowed: query, document"):
        loaded(tmp_path)
    assert loaded(tmp_path, route="query").engine.dimension == 8


def test_the_setting() -> None:
    """A flag and a variable like the others."""
    assert from_sources({}, {}).route is None
    assert from_sources({}, {"JAXEMBED_ROUTE": "query"}).route == "query"
    assert from_sources({"route": "document"}, {"JAXEMBED_ROUTE": "query"}).route == "document"


def sparse(folder: Path) -> None:
    """A SPLADE model as sentence-transformers writes it."""
    hf = save_checkpoint(BertForMaskedLM(BertConfig(**TINY)), folder / "hf")
    SparseEncoder(str(hf), device="cpu").save_pretrained(str(folder), create_model_card=False)


def sparse_static(folder: Path) -> None:
    """A weight for each token."""
    tokenizer = tiny_transformer(folder / "hf").tokenizer
    SparseEncoder(modules=[SparseStaticEmbedding(tokenizer)], device="cpu").save_pretrained(
        str(folder), create_model_card=False
    )


def late(folder: Path) -> None:
    """A ColBERT model as sentence-transformers writes it."""
    tiny_transformer(folder / "hf")
    MultiVectorEncoder(str(folder / "hf"), device="cpu").save_pretrained(str(folder), create_model_card=False)


def cross(folder: Path) -> None:
    """A cross-encoder as sentence-transformers writes it."""
    hf = save_checkpoint(BertForSequenceClassification(BertConfig(**TINY, num_labels=1)), folder / "hf")
    CrossEncoder(str(hf), device="cpu").save_pretrained(str(folder), create_model_card=False)


def old_cross(folder: Path) -> None:
    """A cross-encoder as versions 4 and 5 wrote it: a folder of transformers with a note in config.json."""
    save_checkpoint(BertForSequenceClassification(BertConfig(**TINY, num_labels=1)), folder)
    config = json.loads((folder / "config.json").read_text())
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"}
    write(folder, {"config.json": config})


def tokens(folder: Path) -> None:
    """A transformer and nothing behind it."""
    save(folder, [tiny_transformer(folder / "hf")])


@pytest.mark.parametrize(
    ("make", "gives"),
    [
        (sparse, "sparse vectors;"),
        (sparse_static, "sparse vectors;"),
        (late, r"a vector for each token \(late interaction\);"),
        (cross, r"scores of pairs \(a cross-encoder\);"),
        (old_cross, r"scores of pairs \(a cross-encoder\);"),
        (tokens, "a vector for each token;"),
    ],
)
def test_models_that_give_something_else(make: Callable[[Path], None], gives: str, tmp_path: Path) -> None:
    """Refused before their weights are read."""
    make(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"")
    if make is sparse_static:
        make(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"this model gives {gives} the server serves models that give one"):
        loaded(tmp_path)


def test_the_command_line_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Status 1, and one line without a traceback."""
    tokens(tmp_path)
    assert main(["serve", str(tmp_path), "--port", "0"]) == 1
    assert "this model gives a vector for each token; the server serves" in capsys.readouterr().err


def test_a_classifier_that_is_no_cross_encoder_is_an_encoder(tmp_path: Path) -> None:
    """As sentence-transformers takes it: the mean of its hidden states."""
    save_checkpoint(BertForSequenceClassification(BertConfig(**TINY, num_labels=3)), tmp_path)
    assert loaded(tmp_path).engine.dimension == WIDTH


def test_tasks_come_along(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the model that was loaded."""
    load = Embedder.from_pretrained

    def with_tasks(*args: Any, **options: Any) -> Embedder:
        embedder = load(*args, **options)
        embedder.model = dataclasses.replace(embedder.model, tasks=("query", "document"))
        return embedder

    assert loaded(tiny_folder).tasks == ()
    monkeypatch.setattr(Embedder, "from_pretrained", with_tasks)
    assert loaded(tiny_folder).tasks == ("query", "document")
