"""Models that part queries from documents: Router folders, and Asym folders of old, against sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from folders import MIN_COSINE, TEXTS, compare, load, old_modules, reload, save, tiny_transformer, write
from parity import cosines, randomise, save_checkpoint, small_tokenizer, tiny_bert
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, StaticEmbedding
from torch import nn

from jaxembed import Embedder
from jaxembed.checkpoint import Checkpoint
from jaxembed.errors import CorruptCheckpointError, PromptNameError, TaskNameError, UnsupportedModelError

WIDTH = 16
PROMPTS = {"query": "find ", "document": "text "}


def dense(seed: int, after: int = WIDTH) -> Dense:
    """A random Dense."""
    return randomise(Dense(WIDTH, after, activation_function=nn.Tanh()), seed)


def table(seed: int = 1) -> StaticEmbedding:
    """A random table of token vectors."""
    backend = small_tokenizer().backend_tokenizer
    return randomise(StaticEmbedding(backend, embedding_dim=WIDTH), seed)


def encoder(folder: Path, seed: int) -> list[Any]:
    """A random BERT and its Pooling."""
    return [tiny_transformer(folder / str(seed), seed, num_hidden_layers=1), Pooling(WIDTH, "mean")]


def check(folder: Path, *tasks: str | None) -> tuple[Embedder, SentenceTransformer]:
    """Each task's vectors are sentence-transformers', and no two tasks' are the same."""
    ours, theirs = load(folder, length=80), reload(folder)
    vectors = []
    for task in tasks:
        compare(ours, theirs, task=task)
        vectors.append(ours.encode(TEXTS, task=task))
    for n, one in enumerate(vectors):
        for other in vectors[:n]:
            assert one.shape != other.shape or cosines(one[:1], other[:1]).min() < 0.99
    return ours, theirs


@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "Normalize"])
def test_queries_through_a_table(normalize: bool, tmp_path: Path) -> None:
    """A Router first: static embeddings for queries, a transformer for documents, a module behind both."""
    router = Router.for_query_document([table()], encoder(tmp_path, 0))
    save(tmp_path / "model", [router, *([Normalize()] if normalize else [])])
    ours, theirs = check(tmp_path / "model", "query", "document")
    assert set(ours.routes) == {"query", "document"}
    # The transformer has 32 positions; the table has none, and the ladder is the limit.
    assert (ours.routes["query"].max_length, ours.routes["document"].max_length) == (80, 32)
    # No task: the default route is for documents.
    compare(ours, theirs)
    np.testing.assert_array_equal(ours.encode(TEXTS), ours.encode(TEXTS, task="document"))
    np.testing.assert_array_equal(ours.encode(TEXTS), ours.encode_document(TEXTS))
    for method in ("encode_query", "encode_document"):
        compare(ours, theirs, method=method)


def test_two_transformers(tmp_path: Path) -> None:
    """Of other sizes and weights, each with modules of its own."""
    wide = [tiny_transformer(tmp_path / "wide", 3, hidden_size=24), Pooling(24, "cls")]
    query = [*encoder(tmp_path, 1), dense(5, 24), Normalize()]
    save(tmp_path / "model", [Router.for_query_document(query, wide, default_route="query")], prompts=PROMPTS)
    ours, theirs = check(tmp_path / "model", "query", "document")
    compare(ours, theirs)
    np.testing.assert_array_equal(ours.encode("a"), ours.encode("a", task="query"))
    assert ours.dimension == 24
    for method in ("encode_query", "encode_document"):
        compare(ours, theirs, method=method)
    # The prompt and the route are told apart.
    compare(ours, theirs, task="query", prompt_name="document")
    compare(ours, theirs, prompt_name="query")
    compare(ours, theirs, task="document", prompt="x y ")
    assert cosines(ours.encode_query(TEXTS), ours.encode(TEXTS, task="query")).min() < 0.99
    with pytest.raises(PromptNameError, match="'document', 'query'"):
        ours.encode("a", task="query", prompt_name="passage")


def test_a_shared_encoder(tmp_path: Path) -> None:
    """A Router in the middle: one transformer, whose weights are loaded once, and a projection for each side."""
    router = Router.for_query_document([dense(1)], [dense(2, 24), Normalize()])
    save(tmp_path / "model", [*encoder(tmp_path, 0), router, Normalize()], prompts=PROMPTS)
    ours, theirs = check(tmp_path / "model", "query", "document")
    for method in ("encode", "encode_query", "encode_document"):
        compare(ours, theirs, method=method)
    query, document = (ours.routes[task].params for task in ("query", "document"))
    shared = query.keys() & document.keys()
    assert "layers.0.query.kernel" in shared
    assert all(query[path] is document[path] for path in shared)
    assert query.keys() - shared == {"query_0_Dense.linear.kernel", "query_0_Dense.linear.bias"}
    assert ours.routes["query"].encode("a").shape == (WIDTH,)
    assert ours.encode("a", task="document").shape == (24,)


def test_an_encoder_in_both_routes(tmp_path: Path) -> None:
    """A Router first whose routes have a transformer in common: saved once, loaded once."""
    first, pooling = encoder(tmp_path, 0)
    router = Router.for_query_document([first, pooling], [first, Pooling(WIDTH, "max"), dense(1)])
    save(tmp_path / "model", [router])
    ours, _ = check(tmp_path / "model", "query", "document")
    query, document = (ours.routes[task].params for task in ("query", "document"))
    assert all(document[path] is array for path, array in query.items())


def test_cut_vectors_of_a_route(tmp_path: Path) -> None:
    """`dimensions`, `normalize`, and the model's `truncate_dim`, which every route has."""
    save(tmp_path / "model", [*encoder(tmp_path, 0), Router.for_query_document([dense(1)], [dense(2)])], truncate_dim=6)
    ours, theirs = check(tmp_path / "model", "query", "document")
    assert ours.encode_query("a").shape == (6,)
    got = ours.encode(TEXTS, task="query", dimensions=5, normalize=True)
    want = theirs.encode(TEXTS, task="query", truncate_dim=5, normalize_embeddings=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_no_default_route(tmp_path: Path) -> None:
    """Texts of no task are refused, there as here."""
    router = Router.for_query_document([dense(1)], [dense(2)], default_route=None, allow_empty_key=False)
    save(tmp_path / "model", [*encoder(tmp_path, 0), router])
    ours, theirs = check(tmp_path / "model", "query", "document")
    assert ours.model.checkpoint.default_route is None
    with pytest.raises(ValueError, match="Could not determine route"):
        theirs.encode(["a"])
    with pytest.raises(TaskNameError, match="a task must be named; known: 'document', 'query'"):
        ours.encode(["a"])
    with pytest.raises(ValueError, match="No route found"):
        theirs.encode(["a"], task="other")
    with pytest.raises(TaskNameError, match="unknown task 'other'; known: 'document', 'query'"):
        ours.encode(["a"], task="other")
    for method in ("encode_query", "encode_document"):
        compare(ours, theirs, method=method)


def test_the_first_route_is_the_default(tmp_path: Path) -> None:
    """Where none is named and texts of no task are allowed."""
    router = Router({"b": [dense(1)], "a": [dense(2)]})
    save(tmp_path / "model", [*encoder(tmp_path, 0), router])
    parameters = json.loads((tmp_path / "model" / "2_Router" / "router_config.json").read_text())
    parameters["parameters"]["default_route"] = None
    write(tmp_path / "model", {"2_Router/router_config.json": parameters})
    ours, theirs = check(tmp_path / "model", "b", "a")
    assert ours.model.checkpoint.default_route == "b"
    compare(ours, theirs)


def test_route_mappings(tmp_path: Path) -> None:
    """Tasks of other names than the routes; those that share a route share its model."""
    router = Router(
        {"light": [dense(1)], "heavy": [dense(2)], "other": [dense(3)]},
        default_route="other",
        route_mappings={("query", "text"): "light", ("document", None): "heavy", ("passage", None): "heavy"},
    )
    save(tmp_path / "model", [*encoder(tmp_path, 0), router], prompts=PROMPTS)
    ours, theirs = check(tmp_path / "model", "query", "document", "other")
    for task in ("passage", "light", "heavy", None):
        compare(ours, theirs, task=task)
    assert ours.routes["passage"] is ours.routes["document"] is ours.routes["heavy"]
    assert ours.routes["query"] is ours.routes["light"]
    for method in ("encode_query", "encode_document"):
        compare(ours, theirs, method=method)


@pytest.mark.parametrize(
    "mappings",
    [
        {(None, "text"): "b", ("query", None): "a"},
        {(None, None): "b", ("query", "text"): "a", ("query", None): "b"},
        {(None, ("image", "text")): "a", (None, "text"): "b", ("query", "text"): "a"},
    ],
)
def test_mappings_for_every_task(mappings: dict[Any, str], tmp_path: Path) -> None:
    """A mapping for all tasks stands above a route's own name, and above the default."""
    save(
        tmp_path / "model",
        [*encoder(tmp_path, 0), Router({"a": [dense(1)], "b": [dense(2)]}, default_route="a", route_mappings=mappings)],
    )
    ours, theirs = check(tmp_path / "model", "query", None)
    for task in ("a", "b", "document"):
        if task in ours.routes:
            compare(ours, theirs, task=task)
    for method in ("encode_query", "encode_document"):
        compare(ours, theirs, method=method)


def test_a_route_for_texts_beside_one_for_images(tmp_path: Path) -> None:
    """Texts go through the route named so, whatever the default; the other's modules are not even read."""
    save(
        tmp_path / "model",
        [Router({"image": encoder(tmp_path, 1), "text": encoder(tmp_path, 0)}, default_route="image")],
    )
    config = json.loads((tmp_path / "model" / "router_config.json").read_text())
    theirs = reload(tmp_path / "model")
    for name in config["structure"]["image"]:
        config["types"][name] = "sentence_transformers.models.CLIPModel"
    write(tmp_path / "model", {"router_config.json": config})
    ours = load(tmp_path / "model")
    assert set(ours.routes) == {"text", "query", "document"}
    for task in (None, "text", "query"):
        compare(ours, theirs, task=task)
    del config["structure"]["text"]
    write(tmp_path / "model", {"router_config.json": config})
    with pytest.raises(UnsupportedModelError, match="begins with CLIPModel"):
        load(tmp_path / "model")
    config["parameters"] |= {"default_route": None, "allow_empty_key": False}
    write(tmp_path / "model", {"router_config.json": config})
    with pytest.raises(UnsupportedModelError, match="has no route for texts, only image"):
        load(tmp_path / "model")


@pytest.mark.parametrize("key", [True, False])
def test_asym_of_old(key: bool, tmp_path: Path) -> None:
    """Version 2 to 4: the class Asym, with its settings in config.json."""
    save_checkpoint(tiny_bert(num_hidden_layers=1), tmp_path)
    names = {"query": "140_Dense", "doc": "141_Dense"}
    write(
        tmp_path,
        {
            "modules.json": old_modules("Transformer", "Pooling", "Asym", "Normalize"),
            "sentence_bert_config.json": {"max_seq_length": 20, "do_lower_case": False},
            "1_Pooling/config.json": {"word_embedding_dimension": WIDTH, "pooling_mode_mean_tokens": True},
            "2_Asym/config.json": {
                "types": {name: "sentence_transformers.models.Dense.Dense" for name in names.values()},
                "structure": {task: [name] for task, name in names.items()},
                "parameters": {"allow_empty_key": key},
            },
        },
    )
    config = {"in_features": WIDTH, "out_features": WIDTH, "bias": True}
    config["activation_function"] = "torch.nn.modules.activation.Tanh"
    for seed, name in enumerate(names.values()):
        write(tmp_path, {f"2_Asym/{name}/config.json": config})
        made = {path: value.numpy() for path, value in dense(seed).state_dict().items()}
        save_file(made, tmp_path / "2_Asym" / name / "model.safetensors")
    # Its own class path of then, "sentence_transformers.models.Dense.Dense", is gone there.
    router = json.loads((tmp_path / "2_Asym" / "config.json").read_text())
    router["types"] = dict.fromkeys(names.values(), "sentence_transformers.models.Dense")
    write(tmp_path, {"2_Asym/config.json": router})
    ours, theirs = check(tmp_path, "query", "doc")
    assert ours.model.checkpoint.default_route == ("query" if key else None)
    compare(ours, theirs, method="encode_query")
    if key:
        compare(ours, theirs)
    else:
        with pytest.raises(TaskNameError, match="a task must be named"):
            ours.encode("a")


def test_queries_without_a_prompt_of_theirs(tmp_path: Path) -> None:
    """The default prompt is for texts of no side alone."""
    save(tmp_path / "model", encoder(tmp_path, 0), prompts={"other": "o "}, default_prompt_name="other")
    name = "config_sentence_transformers.json"
    extra = json.loads((tmp_path / "model" / name).read_text())
    for prompts in ({"other": "o "}, {"other": "o ", "query": None}, {"other": "o ", "query": "q ", "document": None}):
        write(tmp_path / "model", {name: {**extra, "prompts": prompts}})
        ours, theirs = load(tmp_path / "model"), reload(tmp_path / "model")
        for method in ("encode", "encode_query", "encode_document"):
            compare(ours, theirs, method=method)
    assert cosines(ours.encode(TEXTS), ours.encode_document(TEXTS)).min() < MIN_COSINE


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Router behind its encoder."""
    folder = tmp_path_factory.mktemp("routed")
    return save(folder / "model", [*encoder(folder, 0), Router.for_query_document([dense(1)], [dense(2)])])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda config: config.pop("types"), CorruptCheckpointError, "is no Router configuration: KeyError.*types"),
        (lambda config: config.update(structure={}), CorruptCheckpointError, "names a route that it does not have"),
        (
            lambda config: config["structure"].update(query=["absent"]),
            CorruptCheckpointError,
            "is no Router configuration: KeyError.*absent",
        ),
        (
            lambda config: config["parameters"].update(default_route="absent"),
            CorruptCheckpointError,
            "names a route that it does not have",
        ),
        (
            lambda config: config["parameters"].update(route_mappings={"('query', None)": "absent"}),
            CorruptCheckpointError,
            "names a route that it does not have",
        ),
        (
            lambda config: config["parameters"].update(route_mappings={"__import__('os')": "query"}),
            CorruptCheckpointError,
            "is no Router configuration",
        ),
        (
            lambda config: config["types"].update(query_0_Dense="sentence_transformers.models.CNN"),
            UnsupportedModelError,
            "the module 'CNN' .* is not supported",
        ),
        (
            lambda config: config["types"].update(query_0_Dense="sentence_transformers.models.Router"),
            UnsupportedModelError,
            "the module 'Router' .* is not supported",
        ),
        (
            lambda config: [
                config["types"].update({"../../1_Pooling": "sentence_transformers.models.Pooling"}),
                config["structure"].update(query=["../../1_Pooling"]),
            ],
            CorruptCheckpointError,
            "leads out of the folder",
        ),
        (
            lambda config: config["parameters"].update(
                route_mappings={"('document', 'text')": "query"}, default_route="document"
            ),
            UnsupportedModelError,
            "texts of no task take the route 'document', which no task leads to",
        ),
    ],
)
def test_a_broken_router(change: Any, error: type[Exception], message: str, routed: Path, tmp_path: Path) -> None:
    """Refused, with the file's name."""
    files = {str(path.relative_to(routed)): path.read_bytes() for path in routed.rglob("*") if path.is_file()}
    write(tmp_path, files)
    config = json.loads((tmp_path / "2_Router" / "router_config.json").read_text())
    change(config)
    write(tmp_path, {"2_Router/router_config.json": config})
    with pytest.raises(error, match=message):
        Checkpoint.open(tmp_path)


def test_options_of_inputs_reach_the_route(routed: Path) -> None:
    """Token ids, single texts and refusals of long texts."""
    ours = load(routed)
    np.testing.assert_allclose(ours.encode([2, 5, 3], task="query"), ours.encode("a", task="query"), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="at most 32"):
        ours.encode_query("a " * 50, truncate=False)
