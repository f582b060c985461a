"""The application around a fake engine: routes, keys, ids, and the whole error table over HTTP."""

import asyncio
import contextlib
import json
import math
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import numpy as np
import pytest
from fakes import FakeEngine, ids_of, loader, vector
from quart import Quart
from quart.typing import TestClientProtocol as Client

from jaxembed.buckets import Ladder
from jaxembed.errors import CheckpointNotFoundError
from jaxembed.tokenizer import Tokenizer
from jaxembed.types import NO_TASK, Column
from jaxembed_server.app import create_app, service_of
from jaxembed_server.config import ServerConfig
from jaxembed_server.model import Loaded, Progress
from jaxembed_server.service import State

NAME = "fake"
JSON = {"Content-Type": "application/json"}
Use = Callable[[Client], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(app: Quart) -> AsyncIterator[Client]:
    async with asyncio.timeout(30), app.test_app():
        while service_of(app).state in (State.LOADING, State.WARMING):
            await asyncio.sleep(0.01)
        yield app.test_client()


def run(test: Use, engine: FakeEngine | None = None, *, model: dict[str, Any] | None = None, **settings: Any) -> None:
    engine = engine or FakeEngine()

    async def main() -> None:
        app = create_app(ServerConfig(model=NAME, **settings), loader(engine, **(model or {})))
        try:
            async with serving(app) as client:
                await test(client)
        finally:
            engine.gate.set()

    asyncio.run(main())


async def post(client: Client, **fields: Any) -> tuple[int, dict[str, Any], Mapping[str, str]]:
    headers = fields.pop("headers", {})
    response = await client.post("/v1/embeddings", data=json.dumps(fields), headers={**JSON, **headers})
    return response.status_code, json.loads(await response.get_data()), response.headers


async def expect(client: Client, status: int, param: str | None, code: str, **fields: Any) -> dict[str, Any]:
    got, body, headers = await post(client, **fields)
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (got, error["param"], error["code"]) == (status, param, code), error
    assert headers["x-request-id"]
    return error


async def occupy(engine: FakeEngine, client: Client, text: str) -> "asyncio.Task[tuple[int, Any, Any]]":
    """Have the engine hold a request until its gate is opened."""
    engine.gate.clear()
    engine.started.clear()
    task = asyncio.create_task(post(client, input=text))
    assert await asyncio.to_thread(engine.started.wait, 10)
    return task


def embedding(text: str) -> list[float]:
    return vector(ids_of(text)).tolist()


def test_the_answer() -> None:
    async def test(client: Client) -> None:
        status, body, _ = await post(client, model=NAME, input=["ab", "c"], additional_data={"k": [1]}, user="u")
        assert status == 200
        assert body == {
            "object": "list",
            "data": [
                {"object": "embedding", "index": 0, "embedding": embedding("ab")},
                {"object": "embedding", "index": 1, "embedding": embedding("c")},
            ],
            "model": NAME,
            "usage": {"prompt_tokens": 7, "total_tokens": 7},
            "additional_data": {"k": [1]},
        }

    run(test)


def test_the_model_may_be_left_out() -> None:
    async def test(client: Client) -> None:
        for fields in ({}, {"model": ""}, {"model": None}):
            assert (await post(client, input="ab", **fields))[1]["model"] == NAME

    run(test)


def test_token_ids_are_used_as_they_are() -> None:
    async def test(client: Client) -> None:
        _, body, _ = await post(client, input=[5, 6])
        assert [one["embedding"] for one in body["data"]] == [vector([5, 6]).tolist()]
        _, body, _ = await post(client, input=[[5, 6], [7]])
        assert [one["embedding"] for one in body["data"]] == [vector([5, 6]).tolist(), vector([7]).tolist()]

    run(test)


def test_options_reach_the_tokenizer_and_the_engine() -> None:
    async def test(client: Client) -> None:
        async def first(**fields: Any) -> list[float]:
            status, body, _ = await post(client, **fields)
            assert status == 200, body
            return body["data"][0]["embedding"]

        assert await first(input="abc", add_special_tokens=False) == vector(ids_of("abc")[1:-1]).tolist()
        assert await first(input="abc", prompt_name="query") == embedding("q:abc")
        assert await first(input="abc", input_type="document") == embedding("d:abc")
        assert await first(input="abc", prompt="x", prompt_name="query") == embedding("xabc")
        assert await first(input="abcdef", truncate_prompt_tokens=4) == vector(ids_of("ab")).tolist()
        assert await first(input="abcdef", truncate_prompt_tokens=4, truncation_side="left") == embedding("ef")
        assert await first(input="a" * 100, truncate_prompt_tokens=-1) == embedding("a" * 14)
        assert await first(input="abc", dimensions=2) == embedding("abc")[:2]
        assert await first(input="abc", dimensions=4) == embedding("abc")

    run(test)


@pytest.mark.parametrize(
    ("fields", "inline"),
    [
        ({"input": "a" * 400}, True),
        ({"input": ["a"] * 30}, True),
        ({"input": [1] * 400}, True),
        ({"input": "a" * 600}, False),
        ({"input": ["a"] * 40}, False),
        ({"input": [[1] * 100] * 8}, False),
        ({"input": ["a", "b"], "prompt": "p" * 300}, False),
    ],
)
def test_only_a_little_is_tokenised_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], inline: bool
) -> None:
    where: list[str] = []

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            where.append(threading.current_thread().name)
            return method(*given, **options)

        return call

    for name in ("encode_texts", "encode_ids"):
        monkeypatch.setattr(Tokenizer, name, watched(getattr(Tokenizer, name)))

    async def test(client: Client) -> None:
        assert (await post(client, truncate_prompt_tokens=-1, **fields))[0] == 200

    run(test)
    assert [name.startswith("tokenize") for name in where] == [not inline]


def test_normalisation_is_the_models_unless_asked_for() -> None:
    engine = FakeEngine()

    async def test(client: Client) -> None:
        for fields in ({}, {"use_activation": False}, {"normalize": True}):
            await post(client, input="a", **fields)

    run(test, engine, model={"normalize": True})
    assert [bool(batch.column(Column.NORMALIZE)[0]) for batch in engine.batches] == [True, False, True]


def test_a_prompts_name_chooses_the_task() -> None:
    engine = FakeEngine()

    async def test(client: Client) -> None:
        for fields in ({}, {"prompt_name": "query"}, {"input_type": "document"}, {"prompt": "x"}):
            assert (await post(client, input="a", **fields))[0] == 200
        assert (await post(client, input=[5], prompt_name="document"))[0] == 200

    run(test, engine, model={"tasks": ("document", "other", "query")})
    assert [int(batch.column(Column.TASK)[0]) for batch in engine.batches] == [NO_TASK, 2, 0, NO_TASK, 0]


@pytest.mark.parametrize(("size", "expected"), [(None, 4), (2, 2), (9, 4)])
def test_the_models_own_default_size(size: int | None, expected: int) -> None:
    async def test(client: Client) -> None:
        _, body, _ = await post(client, input="a")
        assert len(body["data"][0]["embedding"]) == expected

    run(test, model={"dimensions": size})


def test_usage_counts_the_tokens_that_were_run() -> None:
    async def test(client: Client) -> None:
        _, body, _ = await post(client, input=["a" * 50, "b"], truncate_prompt_tokens=5)
        assert body["usage"] == {"prompt_tokens": 8, "total_tokens": 8}

    run(test)


def test_errors_of_the_input() -> None:
    async def test(client: Client) -> None:
        await expect(client, 400, "input", "missing_required_parameter")
        await expect(client, 400, "input[1]", "empty_input", input=["a", ""])
        await expect(client, 400, "input", "array_above_max_length", input=["a"] * 9)
        await expect(client, 400, "input", "context_length_exceeded", input="a" * 15)
        await expect(client, 400, "input[1]", "context_length_exceeded", input=["a", "a" * 15])
        await expect(client, 400, "input", "context_length_exceeded", input=[1] * 17)
        await expect(client, 400, "input", "max_tokens_per_request", input=["a" * 14] * 3)
        await expect(client, 400, "input[2]", "invalid_token_id", input=[1, 2, 1000])
        await expect(client, 400, "input[1][0]", "invalid_token_id", input=[[1], [-1]])
        await expect(client, 400, "input[0][0]", "invalid_token_id", input=[[2**70]])

    run(test, max_client_batch_size=8, max_request_tokens=40)


def test_errors_of_the_options() -> None:
    async def test(client: Client) -> None:
        error = await expect(client, 404, "model", "model_not_found", input="a", model="other")
        assert "'other'" in error["message"]
        assert "'fake'" in error["message"]
        error = await expect(client, 400, "dimensions", "invalid_dimensions", input="a", dimensions=1)
        assert "2, 3, 4" in error["message"]
        await expect(client, 400, "dimensions", "invalid_dimensions", input="a", dimensions=5)
        await expect(client, 400, "truncate_prompt_tokens", "invalid_value", input="a", truncate_prompt_tokens=17)
        error = await expect(client, 400, "prompt_name", "invalid_value", input="a", prompt_name="passage")
        assert "'document', 'query'" in error["message"]

    run(test)


def test_dimensions_of_a_model_without_matryoshka() -> None:
    async def test(client: Client) -> None:
        await expect(client, 400, "dimensions", "dimensions_not_supported", input="a", dimensions=2)
        assert (await post(client, input="a", dimensions=4))[0] == 200

    run(test, model={"sizes": None})


def test_errors_of_http_itself() -> None:
    async def test(client: Client) -> None:
        async def error_of(response: Any) -> tuple[int, str]:
            error = json.loads(await response.get_data())["error"]
            assert set(error) == {"message", "type", "param", "code"}
            return response.status_code, error["code"]

        body = json.dumps({"input": "a"})
        assert await error_of(await client.get("/nowhere")) == (404, "not_found")
        assert await error_of(await client.get("/v1/embeddings")) == (405, "method_not_allowed")
        plain = await client.post("/v1/embeddings", data=body, headers={"Content-Type": "text/plain"})
        assert await error_of(plain) == (415, "unsupported_media_type")
        assert await error_of(await client.post("/v1/embeddings", data=body)) == (415, "unsupported_media_type")
        charset = await client.post(
            "/v1/embeddings", data=body, headers={"Content-Type": "application/json; charset=utf-8"}
        )
        assert charset.status_code == 200
        large = await client.post("/v1/embeddings", data=b" " * 5000, headers=JSON)
        assert await error_of(large) == (413, "payload_too_large")
        assert await error_of(await client.post("/v1/embeddings", data=b"\xff", headers=JSON)) == (400, "invalid_json")

    run(test, max_body_bytes=4096)


def test_405_says_what_is_allowed() -> None:
    async def test(client: Client) -> None:
        assert "POST" in (await client.get("/v1/embeddings")).headers["Allow"]

    run(test)


def test_keys() -> None:
    async def test(client: Client) -> None:
        for headers, code in (
            ({}, "missing_api_key"),
            ({"Authorization": "Basic abc"}, "missing_api_key"),
            ({"Authorization": "Bearer wrong"}, "invalid_api_key"),
            ({"Authorization": "Bearer wröng"}, "invalid_api_key"),
        ):
            status, body, sent = await post(client, input="a", headers=headers)
            assert (status, body["error"]["code"], sent["WWW-Authenticate"]) == (401, code, "Bearer")
            assert (await client.get("/v1/models", headers=headers)).status_code == 401
        for key in ("one", "two"):
            assert (await post(client, input="a", headers={"Authorization": f"Bearer {key}"}))[0] == 200
        for open_route in ("/health", "/ready", "/metrics", "/version", "/ping", "/docs", "/openapi.json"):
            assert (await client.get(open_route)).status_code == 200

    run(test, api_key=("one", "two"))


def test_request_ids() -> None:
    async def test(client: Client) -> None:
        assert (await post(client, input="a", headers={"x-request-id": "h"}, request_id="b"))[2]["x-request-id"] == "h"
        assert (await post(client, input="a", request_id="b"))[2]["x-request-id"] == "b"
        made = {(await post(client, input="a"))[2]["x-request-id"] for _ in range(3)}
        assert len(made) == 3
        for bad in ("x" * 200, "é", "a\r\nb: c"):
            sent = (await post(client, input="a", request_id=bad))[2]["x-request-id"]
            assert sent != bad
            assert sent.isalnum()

    run(test)


def test_models() -> None:
    async def test(client: Client) -> None:
        listed = json.loads(await (await client.get("/v1/models")).get_data())
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["org/a", "b"]
        card = listed["data"][0]
        assert (card["object"], card["root"], card["max_model_len"], card["parent"]) == ("model", NAME, 16, None)
        assert (card["embedding_dimension"], card["matryoshka_dimensions"]) == (4, [2, 3])
        one = await client.get("/v1/models/org/a")
        assert json.loads(await one.get_data()) == card
        missing = await client.get("/v1/models/org/c")
        assert (missing.status_code, json.loads(await missing.get_data())["error"]["code"]) == (404, "model_not_found")
        assert (await post(client, input="a", model="b"))[1]["model"] == "b"

    run(test, served_model_name=("org/a", "b"))


def test_operations_routes() -> None:
    async def test(client: Client) -> None:
        await post(client, input=["a", "b"])
        await client.get("/nowhere")
        assert json.loads(await (await client.get("/health")).get_data()) == {"status": "ok"}
        ready = await client.get("/ready")
        assert json.loads(await ready.get_data()) == {"status": "ready", "warmed": 2, "of": 2}
        assert (await client.post("/ping")).status_code == 200
        versions = json.loads(await (await client.get("/version")).get_data())
        assert {"jaxembed", "jax", "jaxlib", "flax", "python"} <= set(versions)
        metrics = (await (await client.get("/metrics")).get_data()).decode()
        for line in (
            'jaxembed_requests_total{route="/v1/embeddings",status="200"} 1.0',
            'jaxembed_requests_total{route="unknown",status="404"} 1.0',
            "jaxembed_tokens_total 6.0",
            "jaxembed_batch_rows_sum 2.0",
            "jaxembed_queue_tokens 0.0",
            "jaxembed_ready 1.0",
            "jaxembed_compiled_buckets 6.0",
        ):
            assert line in metrics

    run(test)


def test_the_openapi_document_describes_every_route_and_only_those() -> None:
    async def test(client: Client) -> None:
        document = json.loads(await (await client.get("/openapi.json")).get_data())
        rules = {
            (str(rule.rule).replace("<path:name>", "{id}"), method.lower())
            for rule in client.app.url_map.iter_rules()
            for method in rule.methods - {"HEAD", "OPTIONS"}
        }
        described = {(path, verb) for path, verbs in document["paths"].items() for verb in verbs}
        assert described | {("/", "get")} == rules
        page = (await (await client.get("/docs")).get_data()).decode()
        for field in document["paths"]["/v1/embeddings"]["post"]["requestBody"]["content"]["application/json"][
            "schema"
        ]["properties"]:
            assert f"<code>{field}</code>" in page
        assert (await client.get("/")).headers["Location"] == "/docs"

    run(test)


def test_a_failing_engine_is_a_500_without_its_message() -> None:
    engine = FakeEngine()
    engine.failure = RuntimeError("secret /path/of/a/file")

    async def test(client: Client) -> None:
        error = await expect(client, 500, None, "internal_error", input="a")
        assert "secret" not in error["message"]
        assert (await post(client, input="a"))[2]["x-should-retry"] == "false"
        engine.failure = None
        assert (await post(client, input="a"))[0] == 200

    run(test, engine)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_vector_that_is_not_finite_is_an_error(bad: float) -> None:
    engine = FakeEngine()

    def spoil(vectors: np.ndarray) -> np.ndarray:
        return np.where(vectors == embedding("b")[0], np.float32(bad), vectors)

    engine.spoil = spoil

    async def test(client: Client) -> None:
        error = await expect(client, 500, None, "non_finite_embedding", input=["a", "b"])
        assert error["message"].endswith("for input 1")
        assert (await post(client, input="a"))[0] == 200

    run(test, engine)


def test_overload_is_a_429_with_the_headers_that_clients_obey() -> None:
    engine = FakeEngine()

    async def test(client: Client) -> None:
        running = await occupy(engine, client, "a" * 10)
        status, body, headers = await post(client, input="a" * 10)
        assert (status, body["error"]["type"], body["error"]["code"]) == (429, "rate_limit_exceeded", "queue_full")
        assert int(headers["Retry-After"]) >= 1
        assert int(headers["retry-after-ms"]) >= 1
        engine.gate.set()
        assert (await running)[0] == 200

    run(test, engine, max_queue_tokens=20)


def test_a_request_that_takes_too_long_is_a_504_and_is_dropped() -> None:
    engine = FakeEngine()

    async def test(client: Client) -> None:
        engine.gate.clear()
        error = await expect(client, 504, None, "deadline_exceeded", input="a")
        assert "0.05 s" in error["message"]
        assert service_of(client.app).metrics.page().count(b"jaxembed_queue_tokens 0.0") == 1

    run(test, engine, request_timeout=0.05)


def test_before_it_is_ready_it_says_so() -> None:
    release = asyncio.Event()

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def slow(config: ServerConfig, progress: Progress) -> Loaded:
            progress(37, 42)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(10)
            return loader(FakeEngine())(config, progress)

        app = create_app(ServerConfig(model=NAME), slow)
        async with asyncio.timeout(30), app.test_app():
            client = app.test_client()
            while service_of(app).state is not State.WARMING:
                await asyncio.sleep(0.01)
            ready = await client.get("/ready")
            assert ready.status_code == 503
            assert json.loads(await ready.get_data()) == {"status": "warming", "warmed": 37, "of": 42}
            assert ready.headers["Retry-After"] == "1"
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 503
            status, body, headers = await post(client, input="a")
            assert (status, body["error"]["code"], body["error"]["type"]) == (503, "not_ready", "server_error")
            assert headers["Retry-After"] == "1"
            release.set()
            while service_of(app).state is not State.READY:
                await asyncio.sleep(0.01)
            assert (await post(client, input="a"))[0] == 200

    asyncio.run(main())


def test_a_model_that_cannot_be_loaded_is_a_failure_and_not_ready() -> None:
    def broken(config: ServerConfig, progress: Progress) -> Loaded:
        raise CheckpointNotFoundError("nowhere")

    async def main() -> None:
        app = create_app(ServerConfig(model=NAME), broken)
        async with asyncio.timeout(30), serving(app) as client:
            service = service_of(app)
            assert (service.state, str(service.failure)) == (State.FAILED, "nowhere")
            assert (await client.get("/ready")).status_code == 503
            error = await expect(client, 503, None, "not_ready", input="a")
            assert "nowhere" not in error["message"]

    asyncio.run(main())


def test_a_model_that_cannot_be_put_to_work_is_a_failure_too() -> None:
    """Not a server that says for ever that it is warming."""

    class Halved(FakeEngine):
        @property
        def ladder(self) -> Ladder:
            raise RuntimeError("no shapes")

        @ladder.setter
        def ladder(self, ladder: Ladder) -> None:
            pass

    async def main() -> None:
        app = create_app(ServerConfig(model=NAME), loader(Halved()))
        async with asyncio.timeout(30), serving(app):
            service = service_of(app)
            assert (service.state, str(service.failure)) == (State.FAILED, "no shapes")

    asyncio.run(main())


def test_draining_finishes_what_is_in_and_refuses_the_rest() -> None:
    engine = FakeEngine()

    async def test(client: Client) -> None:
        running = await occupy(engine, client, "a")
        draining = asyncio.create_task(service_of(client.app).drain())
        await asyncio.sleep(0)
        await expect(client, 503, None, "not_ready", input="a")
        assert (await client.get("/ready")).status_code == 503
        engine.gate.set()
        await draining
        assert (await running)[0] == 200

    run(test, engine)


def test_a_drain_gives_up_in_time() -> None:
    engine = FakeEngine()

    async def test(client: Client) -> None:
        running = await occupy(engine, client, "a")
        await service_of(client.app).drain()
        service_of(client.app).close()
        assert (await running)[0] == 503

    run(test, engine, drain_timeout=0.05)
