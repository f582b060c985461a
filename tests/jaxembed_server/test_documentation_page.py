"""Every example of the API's documentation page, against a real server: by plain HTTP and by the official client."""

import base64
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
import requests
from servers import Server
from sklearn.cluster import KMeans

from jaxembed import Embedder

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
NOMIC = "nomic-ai/nomic-embed-text-v1.5"
SAME = 2e-6


def post(server: Server, **body: object) -> requests.Response:
    return requests.post(f"{server.url}/v1/embeddings", json=body, timeout=60)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client


def test_single_text(server: Server, minilm: Embedder) -> None:
    text = "The quick brown fox jumps over the lazy dog"
    answer = post(server, model=MODEL, input=text).json()
    assert {key: answer[key] for key in ("object", "model", "usage")} == {
        "object": "list",
        "model": MODEL,
        "usage": {"prompt_tokens": 11, "total_tokens": 11},
    }
    (one,) = answer["data"]
    assert (one["object"], one["index"]) == ("embedding", 0)
    np.testing.assert_allclose(one["embedding"], minilm.encode(text), rtol=0, atol=SAME)


def test_batch(server: Server, client: openai.OpenAI, minilm: Embedder) -> None:
    texts = ["First document to embed", "Second document to embed", "Third document to embed"]
    answer = post(server, model=MODEL, input=texts).json()
    assert [one["index"] for one in answer["data"]] == [0, 1, 2]
    assert answer["usage"] == {"prompt_tokens": 21, "total_tokens": 21}
    by_http = np.array([one["embedding"] for one in answer["data"]])
    np.testing.assert_allclose(by_http, minilm.encode(texts), rtol=0, atol=SAME)
    official = client.embeddings.create(model=MODEL, input=texts)
    np.testing.assert_allclose([one.embedding for one in official.data], by_http, rtol=0, atol=SAME)
    assert official.usage.total_tokens == 21


def test_token_ids(server: Server, client: openai.OpenAI, minilm: Embedder) -> None:
    ids = [101, 7592, 2088, 102]
    one = client.embeddings.create(model=MODEL, input=ids)
    several = client.embeddings.create(model=MODEL, input=[ids, ids[:3]])
    np.testing.assert_allclose(one.data[0].embedding, minilm.encode("Hello world"), rtol=0, atol=SAME)
    np.testing.assert_allclose(
        [each.embedding for each in several.data], minilm.encode([ids, ids[:3]]), rtol=0, atol=SAME
    )
    assert several.usage.prompt_tokens == 7


def test_matryoshka(start: Callable[..., Server], minilm_folder: Path, minilm: Embedder, tmp_path: Path) -> None:
    """256 dimensions of a model that declares them: the real MiniLM, with a config.json that says so."""
    folder = tmp_path / "declared"
    shutil.copytree(minilm_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "matryoshka_dimensions": [384, 256, 128]}))
    # This model finds nothing in the cache: no more shapes than the text needs.
    sizes = ("--max-length", "16", "--max-batch-tokens", "16")
    server = start(str(folder), "--served-model-name", NOMIC, *sizes).wait_until_ready()
    text = "Sample text for embedding"
    answer = post(server, model=NOMIC, input=text, dimensions=256)
    assert answer.status_code == 200
    vector = np.array(answer.json()["data"][0]["embedding"])
    assert vector.shape == (256,)
    cut = minilm.encode(text)[:256]
    np.testing.assert_allclose(vector, cut / np.linalg.norm(cut), rtol=0, atol=SAME)
    with server.client() as official:
        by_client = official.embeddings.create(model=NOMIC, input=text, dimensions=256)
        np.testing.assert_allclose(by_client.data[0].embedding, vector, rtol=0, atol=SAME)
        with pytest.raises(openai.BadRequestError, match="128, 256, 384"):
            official.embeddings.create(model=NOMIC, input=text, dimensions=200)


def test_base64(server: Server, client: openai.OpenAI, minilm: Embedder) -> None:
    answer = post(server, model=MODEL, input="Hello world", encoding_format="base64").json()
    vector = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(vector, minilm.encode("Hello world"), rtol=0, atol=SAME)
    raw = client.embeddings.create(model=MODEL, input="Hello world", encoding_format="base64")
    assert raw.data[0].embedding == answer["data"][0]["embedding"]


def test_truncate_prompt_tokens_and_additional_data(server: Server, minilm: Embedder) -> None:
    text = "one two three four five six seven eight"
    extra = {"trace": [1, None, "ü"], "number": 1.0}
    answer = post(server, model=MODEL, input=text, truncate_prompt_tokens=5, additional_data=extra).json()
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["additional_data"] == extra
    np.testing.assert_allclose(answer["data"][0]["embedding"], minilm.encode("one two three"), rtol=0, atol=SAME)
    long = "word " * 600
    assert post(server, input=long).json()["error"]["code"] == "context_length_exceeded"
    assert post(server, input=long, truncate_prompt_tokens=-1).json()["usage"]["prompt_tokens"] == 256


def test_semantic_search(server: Server) -> None:
    documents = ["Paris is the capital of France", "London is in England", "Berlin is in Germany"]
    found = post(server, model=MODEL, input=documents).json()["data"]
    query = post(server, model=MODEL, input="What is the capital of France?").json()["data"][0]["embedding"]
    similarities = [np.dot(query, document["embedding"]) for document in found]
    assert documents[int(np.argmax(similarities))] == "Paris is the capital of France"


def test_clustering(server: Server) -> None:
    texts = [
        "The cat sleeps on the sofa",
        "A cat is asleep on the couch",
        "The kitten naps on the sofa",
        "Stocks fell after the central bank raised rates",
        "Investors sold bonds and shares",
        "Shares and bonds fell on the stock market",
        "Bake the bread for forty minutes",
        "Bake the loaf of bread in the oven",
        "Knead the bread dough, then bake it",
    ]
    embeddings = [one["embedding"] for one in post(server, model=MODEL, input=texts).json()["data"]]
    clusters = KMeans(n_clusters=3, n_init=10, random_state=0).fit_predict(embeddings).tolist()
    groups = [set(clusters[i : i + 3]) for i in (0, 3, 6)]
    assert [len(group) for group in groups] == [1, 1, 1]
    assert len(set.union(*groups)) == 3


def test_models_through_the_client(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_an_unknown_model_through_the_client(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.embeddings.create(model="another", input="text")
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"
