"""A POST route with JSON in and JSON out, answered straight from ASGI.

Quart makes two tasks, two contexts, a request and a response object for each request, looks up hooks, signals and
rules, and looks at them all again at the end: that costs more than everything we do ourselves for a short text. This
does for one fixed path what is needed, in this order: key, content type, body, answer. Knows no model.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from jaxembed_server.config import ServerConfig
from jaxembed_server.deadlines import Deadlines, Interruption
from jaxembed_server.errors import ApiError, invalid
from jaxembed_server.exchange import Exchange
from jaxembed_server.metrics import Metrics

__all__ = ["Handler", "JsonRoute"]

BODY_SECONDS = 60.0
"""A body that is not there after so long is a 408."""

UNWATCHED_SECONDS = 0.25
"""Nobody looks whether a client has gone before its request takes so long: most are answered by then."""

JSON = b"application/json"

Handler = Callable[[Exchange, bytes], Awaitable[bytes]]
"""The body of a request -> the body of its 200; or raises. Cancelled when the client has gone."""

Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class ClientGoneError(Exception):
    """The client hung up before it had sent its whole request."""


class JsonRoute:
    """One path, as an ASGI application.

    Args:
        path: of the route.
        handler: answers.
        config: the settings.
        metrics: counts the requests.
    """

    def __init__(self, path: str, handler: Handler, config: ServerConfig, metrics: Metrics) -> None:
        self.path = path
        self._handler = handler
        self._config = config
        self._metrics = metrics
        self._reading = Deadlines(BODY_SECONDS)
        self._unwatched = Deadlines(UNWATCHED_SECONDS)

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one POST."""
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, value)
        sent_id = headers.get(b"x-request-id")
        exchange = Exchange(
            self._config,
            self._metrics,
            method="POST",
            path=self.path,
            request_id=None if sent_id is None else sent_id.decode("latin-1"),
        )
        whole = False
        status, more, content = 200, {}, b""
        try:
            exchange.check_key(headers.get(b"authorization", b"").decode("latin-1"))
            check_content_type(headers.get(b"content-type", b""))
            declared = headers.get(b"content-length", b"")
            body = await read_body(receive, declared, self._config.max_body_bytes, self._reading)
            whole = True
            with Cancelled(receive, self._unwatched) as cancelled:
                content = await self._handler(exchange, body)
            if cancelled:
                return
        except ClientGoneError:
            return
        except Exception as error:  # Whatever it is, the client hears of it.
            told = exchange.told(error)
            status, more, content = told.status, dict(told.headers), told.body()
        start = {
            "type": "http.response.start",
            "status": status,
            "headers": [
                (b"content-type", JSON),
                (b"content-length", b"%d" % len(content)),
                (b"x-request-id", exchange.close(self.path, status).encode()),
                *((name.lower().encode(), value.encode()) for name, value in more.items()),
            ],
        }
        # A server may hold a few parts of a body for us and no more: one that waits with the next could not hear us.
        rest = None if whole else asyncio.ensure_future(discard(receive))
        try:
            await send(start)
            await send({"type": "http.response.body", "body": content})
        finally:
            if rest is not None:
                rest.cancel()


class Cancelled(Interruption):
    """Cancels what runs inside it when the client has gone; then it is true, and the cancellation ends here.

    Args:
        receive: ASGI's; not called by anybody else meanwhile.
        unwatched: says when to begin to look: that takes a task.
    """

    __slots__ = ("_receive", "_watch")

    def __init__(self, receive: Receive, unwatched: Deadlines) -> None:
        super().__init__(unwatched)
        self._receive = receive
        self._watch: asyncio.Task[None] | None = None

    def __bool__(self) -> bool:
        return self.cancelled

    def late(self) -> None:
        """The request takes long: look whether its client has gone."""
        self._watch = asyncio.ensure_future(self._until_gone())

    async def _until_gone(self) -> None:
        await discard(self._receive)
        self.cancel()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if self._watch is not None:
            self._watch.cancel()
            # Its exception will hold it, and it holds this: a circle, for the collector of garbage.
            self._watch = None
        return self.ended(error)


async def discard(receive: Receive) -> None:
    """Take what the client sends and drop it; returns when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def check_content_type(header: bytes) -> None:
    """A JSON media type, whatever its parameters.

    Raises:
        ApiError: 415, it is another.
    """
    media_type = header.partition(b";")[0].strip().lower()
    if media_type != JSON and not media_type.endswith(b"+json"):
        shown = media_type[:64].decode("latin-1")
        message = f"the content type is {shown!r}; it must be 'application/json'"
        raise invalid(None, "unsupported_media_type", message, status=415)


async def read_body(receive: Receive, declared: bytes, limit: int, reading: Deadlines) -> bytes:
    """The whole body.

    Args:
        receive: ASGI's.
        declared: the content length; b"" if the client does not say.
        limit: bytes that it may have.
        reading: says when it takes too long.

    Raises:
        ApiError: 413, it is larger; 408, it takes too long.
        ClientGoneError: it will never be whole.
    """
    if declared.isdigit() and int(declared) > limit:
        raise body_too_large(limit)
    parts, size = [], 0
    try:
        with reading.timeout():
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise body_too_large(limit)
                if part:
                    parts.append(part)
                if not message.get("more_body", False):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
    except TimeoutError:
        raise invalid(None, "request_timeout", "the body did not arrive in time", status=408) from None


def body_too_large(limit: int) -> ApiError:
    """413."""
    message = f"the body is larger than {limit} bytes, which is the most that is allowed"
    return invalid(None, "payload_too_large", message, status=413)
