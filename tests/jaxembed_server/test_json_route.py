"""A route without Quart: bodies in parts, clients that go away, and servers that hold only a part of a body."""

import asyncio
import gc
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakes import FakeEngine, loader

from jaxembed_server import json_route
from jaxembed_server.app import create_app, service_of
from jaxembed_server.config import ServerConfig
from jaxembed_server.exchange import Exchange
from jaxembed_server.json_route import JsonRoute
from jaxembed_server.metrics import Metrics
from jaxembed_server.service import State

PATH = "/v1/things"
JSON = (b"content-type", b"application/json")
GONE = {"type": "http.disconnect"}


def part(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


class Caller:
    """The server's side of one ASGI call.

    Attributes:
        sent: what the application sent.
        messages: what it may still receive; it waits when there are none.
    """

    def __init__(self, *messages: dict[str, Any], held: int = 100) -> None:
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue(held)
        self._first = messages
        self.sent: list[dict[str, Any]] = []
        self.before_send: Callable[[], Awaitable[None]] | None = None

    async def call(self, app: Any, *headers: tuple[bytes, bytes], path: str = PATH, root: str = "") -> None:
        for message in self._first:
            self.messages.put_nowait(message)
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "root_path": root,
            "headers": list(headers),
            "http_version": "1.1",
            "scheme": "http",
            "query_string": b"",
        }
        async with asyncio.timeout(10):
            await app(scope, self.messages.get, self._send)

    async def _send(self, message: dict[str, Any]) -> None:
        if self.before_send is not None:
            await self.before_send()
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def code(self) -> str:
        return json.loads(self.body)["error"]["code"]


async def echo(exchange: Exchange, body: bytes) -> bytes:
    return body


def route(handler: json_route.Handler = echo, **settings: Any) -> tuple[JsonRoute, Metrics]:
    metrics = Metrics()
    return JsonRoute(PATH, handler, ServerConfig(model="m", **settings), metrics), metrics


def test_a_body_in_parts_is_put_together() -> None:
    caller = Caller(part(b'{"a"', True), part(b"", True), part(b":1}", True), part(b""))
    asyncio.run(caller.call(route()[0], JSON))
    assert (caller.status, caller.body) == (200, b'{"a":1}')
    assert caller.headers[b"content-length"] == b"7"
    assert caller.headers[b"content-type"] == b"application/json"


@pytest.mark.parametrize("declared", [b"11", b"3", b"-3", b"\xb2", b""])
def test_a_body_over_the_limit_is_refused_whatever_length_it_declares(declared: bytes) -> None:
    caller = Caller(part(b"x" * 6, True), part(b"x" * 5, True), part(b""))
    asyncio.run(caller.call(route(max_body_bytes=10)[0], JSON, (b"content-length", declared)))
    assert (caller.status, caller.code) == (413, "payload_too_large")


def test_a_declared_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    caller = Caller()
    asyncio.run(caller.call(route(max_body_bytes=10)[0], JSON, (b"content-length", b"11")))
    assert (caller.status, caller.code) == (413, "payload_too_large")


def test_the_rest_of_a_refused_body_is_taken_while_the_answer_is_sent() -> None:
    """A server that may hold two messages waits with the third until we take one, and sends nothing meanwhile."""
    caller = Caller(held=2)

    async def main() -> None:
        async def upload() -> None:
            for _ in range(20):
                await caller.messages.put(part(b"x" * 6, True))

        uploading = asyncio.ensure_future(upload())
        caller.before_send = lambda: asyncio.shield(uploading)
        await caller.call(route(max_body_bytes=10)[0], JSON)

    asyncio.run(main())
    assert caller.code == "payload_too_large"


def test_a_body_that_does_not_come_is_a_408(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_route, "BODY_SECONDS", 0.01)
    caller = Caller(part(b"{", True))
    asyncio.run(caller.call(route()[0], JSON))
    assert (caller.status, caller.code) == (408, "request_timeout")


def test_a_client_that_goes_before_its_body_is_whole_gets_nothing_and_is_not_counted() -> None:
    async def never(exchange: Exchange, body: bytes) -> bytes:
        raise AssertionError("half a body was handled")

    made, metrics = route(never)
    caller = Caller(part(b"{", True), GONE)
    asyncio.run(caller.call(made, JSON))
    assert caller.sent == []
    assert b"jaxembed_requests_total{" not in metrics.page()


def test_a_client_that_goes_cancels_its_handler() -> None:
    cancelled: list[bool] = []

    async def main() -> None:
        caller = Caller(part(b"{}"))

        async def waits(exchange: Exchange, body: bytes) -> bytes:
            caller.messages.put_nowait(GONE)
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise
            return b""

        await caller.call(route(waits)[0], JSON)
        assert caller.sent == []
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0

    asyncio.run(main())
    assert cancelled == [True]


def test_a_server_that_stops_is_not_taken_for_a_client_that_has_gone() -> None:
    async def waits(exchange: Exchange, body: bytes) -> bytes:
        await asyncio.sleep(10)
        return b""

    async def main() -> None:
        task = asyncio.ensure_future(Caller(part(b"{}")).call(route(waits)[0], JSON))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


def test_nothing_of_a_request_outlives_it() -> None:
    async def main() -> None:
        for messages in ((part(b"{}"),), (part(b"x" * 20, True),), (part(b"{", True), GONE)):
            await Caller(*messages).call(route(max_body_bytes=10)[0], JSON)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


@pytest.mark.parametrize("unwatched", [10.0, 0.01])
def test_a_request_leaves_no_circles_of_objects_for_the_collector_of_garbage(
    unwatched: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would cost a server with many short requests a twentieth of what HTTP does."""
    monkeypatch.setattr(json_route, "UNWATCHED_SECONDS", unwatched)

    async def slow(exchange: Exchange, body: bytes) -> bytes:
        await asyncio.sleep(0.03)
        return body

    async def main() -> None:
        made, _ = route(slow)
        for _ in range(2):
            gc.collect()
            for _ in range(3):
                await Caller(part(b"{}")).call(made, JSON)
            await asyncio.sleep(0)
        assert gc.collect() == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        (b"application/json", 200),
        (b"Application/JSON ; charset=utf-8", 200),
        (b"application/problem+json", 200),
        (b"text/plain", 415),
        (b"application/jsonx", 415),
        (b"", 415),
    ],
)
def test_content_types(content_type: bytes, status: int) -> None:
    caller = Caller(part(b"{}"))
    asyncio.run(caller.call(route()[0], (b"content-type", content_type)))
    assert caller.status == status


def test_a_key_is_asked_for_before_the_body_is_read() -> None:
    caller = Caller()
    asyncio.run(caller.call(route(api_key=("k",))[0], JSON))
    assert (caller.status, caller.code) == (401, "missing_api_key")
    assert caller.headers[b"www-authenticate"] == b"Bearer"
    caller = Caller(part(b"{}"))
    asyncio.run(caller.call(route(api_key=("k",))[0], JSON, (b"authorization", b"Bearer k")))
    assert caller.status == 200


def test_the_first_of_two_headers_counts_and_answers_are_counted() -> None:
    made, metrics = route()
    caller = Caller(part(b"{}"))
    asyncio.run(caller.call(made, JSON, (b"x-request-id", b"one"), (b"x-request-id", b"two")))
    assert caller.headers[b"x-request-id"] == b"one"
    asyncio.run(Caller(part(b"{}")).call(made))
    page = metrics.page()
    assert b'jaxembed_requests_total{route="/v1/things",status="200"} 1.0' in page
    assert b'jaxembed_requests_total{route="/v1/things",status="415"} 1.0' in page
    assert b'jaxembed_request_seconds_count{route="/v1/things"} 2.0' in page


@pytest.mark.parametrize(
    ("path", "root"),
    [("/v1/embeddings", ""), ("http://somewhere/v1/embeddings", ""), ("/below/v1/embeddings", "/below")],
)
def test_every_form_of_the_path_comes_to_the_route(path: str, root: str) -> None:
    async def main() -> None:
        app = create_app(ServerConfig(model="fake"), loader(FakeEngine()))
        async with app.test_app():
            while service_of(app).state is not State.READY:
                await asyncio.sleep(0.01)
            caller = Caller(part(b'{"input":"a"}'))
            await caller.call(app, JSON, path=path, root=root)
            assert caller.status == 200

    asyncio.run(main())
