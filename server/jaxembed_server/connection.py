"""Hypercorn's connections, at less cost for a short answer; and serving an application over them.

Of what Hypercorn spends on a request two things show beside the model (docs/performance/server.md): the parts of an
answer, each written to the socket by itself, which wakes the client for a head without a body; and the idle time of
a connection, for which two tasks begin and are cancelled with each request. Here parts wait for the end of the event
loop's turn and are written together, and a connection has one task for its idle time as long as it lives. All else,
HTTP itself before all, is Hypercorn's.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from hypercorn.asyncio import run
from hypercorn.asyncio.tcp_server import TCPServer
from hypercorn.config import Config, Sockets
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.utils import wrap_app

__all__ = ["Connection", "serve"]

MOST_HELD = 2**16
"""Bytes that may wait for the end of the event loop's turn: more are written at once."""


class Connection(TCPServer):
    """One client's; begins idle. Takes what Hypercorn gives its own."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        # Written together at the end of the event loop's turn.
        self._parts: list[bytes] = []
        self._idle_since: float | None = self.loop.time()

    async def protocol_send(self, event: Event) -> None:
        """What HTTP has to tell: bytes for the client, an end, or that a request has begun or ended."""
        if isinstance(event, RawData):
            if event.data:
                if not self._parts:
                    self.loop.call_soon(self._write)
                self._parts.append(event.data)
                if sum(map(len, self._parts)) > MOST_HELD:
                    self._write()
            try:
                # A client that does not read holds its answer up.
                await self.writer.drain()
            except (ConnectionError, RuntimeError):
                await self.protocol.handle(Closed())
        elif isinstance(event, Updated):
            self._idle_since = self.loop.time() if event.idle else None
        else:
            await super().protocol_send(event)

    def _write(self) -> None:
        parts, self._parts = self._parts, []
        # A client that has gone is noticed by whoever reads from it.
        with contextlib.suppress(ConnectionError, RuntimeError):
            if parts:
                self.writer.writelines(parts)

    async def _close(self) -> None:
        self._write()
        await super()._close()

    async def _idle_timeout(self) -> None:
        """Close the connection once it has been idle for too long, or is when the server ends."""
        terminated = self.context.terminated
        while not terminated.is_set():
            idle = 0.0 if self._idle_since is None else self.loop.time() - self._idle_since
            if idle >= self.config.keep_alive_timeout:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(terminated.wait(), self.config.keep_alive_timeout - idle)
        # One that is busy when the server ends is closed with its answer.
        if self._idle_since is not None:
            await asyncio.shield(self._initiate_server_close())


async def serve(app: Any, settings: Config, sockets: Sockets, until: Callable[[], Awaitable[None]]) -> None:
    """Serve an ASGI application until `until` returns, and then let the requests in flight finish."""
    # Hypercorn has no setting for it, so that its name is changed, which a type checker does not like. Were it to look
    # elsewhere some day, its own connections would do, at their cost.
    run.TCPServer = Connection  # type: ignore[assignment,attr-defined]
    wrapped = wrap_app(app, settings.wsgi_max_body_size, "asgi")
    await run.worker_serve(wrapped, settings, sockets=sockets, shutdown_trigger=until)
