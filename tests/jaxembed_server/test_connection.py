"""Connections over real sockets: parts of an answer, clients that are slow, gone or idle, and a server that ends."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypercorn.config import Config, Sockets

from jaxembed_server.cli import event_loop
from jaxembed_server.connection import serve

GET = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
MUCH = b"x" * 2**20
LOOPS = [pytest.param(event_loop(), id="uvloop"), pytest.param(asyncio.SelectorEventLoop, id="asyncio")]

Application = Callable[[Any, Any, Any], Awaitable[None]]
Client = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Site:
    """An application that is served while it is entered; its clients are closed at the end.

    Attributes:
        end: set it to end the server sooner.
    """

    def __init__(self, app: Application, keep_alive: float = 30) -> None:
        settings = Config.from_mapping(keep_alive_timeout=keep_alive, include_date_header=False)
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        self._clients: list[asyncio.StreamWriter] = []
        self._port = listening.getsockname()[1]
        self.end = asyncio.Event()

        async def until() -> None:
            await self.end.wait()

        self._task = asyncio.ensure_future(serve(with_lifespan(app), settings, Sockets([], [listening], []), until))

    async def __aenter__(self) -> "Site":
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        self.end.set()
        if error is not None:
            # Nobody reads any more.
            for writer in self._clients:
                writer.transport.abort()
        await self._task
        for writer in self._clients:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def client(self, sent: bytes = b"") -> Client:
        """A new one, which has sent this."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self._clients.append(writer)
        writer.write(sent)
        return reader, writer


def with_lifespan(app: Application) -> Application:
    async def whole(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "lifespan":
            return await app(scope, receive, send)
        for _ in range(2):
            await send({"type": (await receive())["type"] + ".complete"})

    return whole


def answering(*bodies: bytes, pause: float | None = None, seconds: float = 0) -> Application:
    """Answers each request with these parts after so many seconds, with pauses between the parts."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(seconds)
        length = str(sum(map(len, bodies))).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        for i, body in enumerate(bodies):
            await send({"type": "http.response.body", "body": body, "more_body": i + 1 < len(bodies)})
            if pause is not None:
                await asyncio.sleep(pause)

    return app


def run(loop: Any, test: Callable[[], Awaitable[None]]) -> None:
    async def whole() -> None:
        await asyncio.wait_for(test(), 60)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(whole())


async def body_of(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), head
    return await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What is written to the sockets of servers, call by call."""
    calls: list[bytes] = []
    write = asyncio.StreamWriter.writelines

    def writelines(self: asyncio.StreamWriter, parts: Any) -> None:
        calls.append(b"".join(parts))
        write(self, parts)

    monkeypatch.setattr(asyncio.StreamWriter, "writelines", writelines)
    yield calls


@pytest.mark.parametrize("loop", LOOPS)
def test_an_answer_is_written_once(loop: Any, written: list[bytes]) -> None:
    async def test() -> None:
        async with Site(answering(b"one", b"two")) as site:
            reader, writer = await site.client()
            for _ in range(3):
                writer.write(GET)
                assert await body_of(reader) == b"onetwo"
            assert len(written) == 3 and len(set(written)) == 1
            assert written[0].startswith(b"HTTP/1.1 200") and written[0].endswith(b"onetwo")

    run(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_parts_do_not_wait_for_later_ones(loop: Any, written: list[bytes]) -> None:
    async def test() -> None:
        async with Site(answering(b"one", b"two", pause=0.05)) as site:
            reader, _ = await site.client(GET)
            assert await body_of(reader) == b"onetwo"
            assert [call[-3:] for call in written] == [b"one", b"two"]

    run(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_requests_sent_together_are_answered_in_order(loop: Any) -> None:
    async def test() -> None:
        async with Site(answering(b"some")) as site:
            reader, _ = await site.client(GET * 20)
            assert [await body_of(reader) for _ in range(20)] == [b"some"] * 20

    run(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_does_not_read_holds_its_answer_up(loop: Any) -> None:
    sent = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % 2**26)]})
        for i in range(64):
            await send({"type": "http.response.body", "body": MUCH, "more_body": i < 63})
            sent.append(i)

    async def test() -> None:
        async with Site(app) as site:
            reader, _ = await site.client(GET)
            await asyncio.sleep(0.5)
            assert len(sent) < 32
            assert await body_of(reader) == MUCH * 64

    run(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_goes_ends_its_answer_alone(loop: Any) -> None:
    ended = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] != "/much":
            return await answering(b"well")(scope, receive, send)
        try:
            await answering(*[MUCH] * 64)(scope, receive, send)
        finally:
            ended.set()

    async def test() -> None:
        async with Site(app) as site:
            _, writer = await site.client(GET.replace(b"/", b"/much", 1))
            await asyncio.sleep(0.2)
            writer.transport.abort()
            await asyncio.wait_for(ended.wait(), 10)
            reader, _ = await site.client(GET)
            assert await body_of(reader) == b"well"

    run(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_garbage_is_answered_before_the_end(loop: Any) -> None:
    async def test() -> None:
        async with Site(answering(b"some")) as site:
            reader, _ = await site.client(b"\x00\xff garbage\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.1 400")

    run(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_idle_connections_are_closed_and_busy_ones_are_not(loop: Any) -> None:
    async def test() -> None:
        async with Site(answering(b"slow", seconds=0.7), keep_alive=0.3) as site:
            silent, _ = await site.client()
            reader, _ = await site.client(GET)
            assert await silent.read() == b""
            assert await body_of(reader) == b"slow"
            answered = time.monotonic()
            assert await reader.read() == b""
            assert time.monotonic() - answered > 0.2

    run(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_idle_time_begins_anew_with_each_answer(loop: Any) -> None:
    async def test() -> None:
        async with Site(answering(b"some"), keep_alive=0.6) as site:
            reader, writer = await site.client()
            for _ in range(5):
                await asyncio.sleep(0.3)
                writer.write(GET)
                assert await body_of(reader) == b"some"
            assert await reader.read() == b""

    run(loop, test)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_server_that_ends_closes_what_is_idle_and_finishes_what_is_not(loop: Any) -> None:
    async def test() -> None:
        async with Site(answering(b"slow", seconds=0.5)) as site:
            idle, _ = await site.client()
            reader, _ = await site.client(GET)
            await asyncio.sleep(0.2)
            site.end.set()
            ending = time.monotonic()
            assert await idle.read() == b""
            assert time.monotonic() - ending < 0.25
            assert await body_of(reader) == b"slow"
            assert await reader.read() == b""

    run(loop, test)
