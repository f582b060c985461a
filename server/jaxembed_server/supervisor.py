"""HTTP processes: started, told the settings, started again when one dies, and ended. Runs in the engine process.

1. Each gets one end of a socket pair, and a listening socket of its own: all are bound to one port with SO_REUSEPORT,
   so that the kernel shares connections out. They stay open here, so that connections wait while a process is replaced.
2. The engine process never reads a byte of HTTP, and an HTTP process never imports JAX.
3. An HTTP process ends when it is told to, or when its channel closes: none outlives this one, however it ends.

Knows nothing of what is asked over a channel.
"""

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from jaxembed.processes import python_command
from jaxembed_server.channel import Channel, Kind, Model
from jaxembed_server.config import ServerConfig
from jaxembed_server.engine_end import EngineEnd, described
from jaxembed_server.service import Service, State

__all__ = ["ProcessError", "Supervisor", "listening_sockets"]

logger = logging.getLogger(__name__)

MODULE = "jaxembed_server.http_process"
LOOK_SECONDS = 0.05
"""How often the state is looked at while it changes: while loading and warming, and while draining."""
END_SECONDS = 5.0
"""How long an HTTP process that should end may take."""
ATTEMPTS = 3
"""Processes in a row that may end before they listen to this one."""
APART: dict[str, Any] = {"stdin": asyncio.subprocess.DEVNULL, "start_new_session": True}
"""A terminal's signals are not for them."""
SLACK_BYTES = 2**20
"""What a frame may have beside the token ids and the numbers of each row: answered requests that are counted."""


class ProcessError(RuntimeError):
    """HTTP processes cannot be started."""


def listening_sockets(bound: socket.socket, count: int, backlog: int) -> list[socket.socket]:
    """Sockets that share the address of `bound`, which lets that happen (SO_REUSEADDR) and is closed.

    It found out that the address is free, which these cannot: they would share it with anybody else's.
    """
    found = []
    address = bound.getsockname()
    for _ in range(count):
        one = socket.socket(bound.family, socket.SOCK_STREAM)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        one.bind(address)
        found.append(one)
    bound.close()
    for one in found:
        one.listen(backlog)
    return found


class Supervisor:
    """The HTTP processes of one server.

    Args:
        config: the settings.
        service: holds the model.
        listening: one socket for each process.
        module: what a process runs; another than the real one only in tests.
    """

    def __init__(
        self, config: ServerConfig, service: Service, listening: list[socket.socket], *, module: str = MODULE
    ) -> None:
        self._config = config
        self._service = service
        self._listening = listening
        self._module = module
        self._ends: list[EngineEnd | None] = [None] * len(listening)
        self._ready = [asyncio.Event() for _ in listening]
        self._stopping = False

    async def serve(self, stop: asyncio.Event, drain: Callable[[], Awaitable[None]]) -> None:
        """Keep the processes until `stop`, then finish what is in flight and end them.

        Args:
            stop: ends the server.
            drain: returns when nothing is in flight any more.

        Raises:
            ProcessError: they cannot be started.
        """
        loop = asyncio.get_running_loop()
        keeping = [loop.create_task(self._keep(number)) for number in range(len(self._listening))]
        announcing = loop.create_task(self._announce(stop))
        try:
            await asyncio.wait([announcing, *keeping], return_when=asyncio.FIRST_COMPLETED)
            stop.set()
            draining = asyncio.ensure_future(drain())
            while not draining.done():
                # That it drains, they must know before it has drained.
                await asyncio.wait([draining], timeout=LOOK_SECONDS)
                self._tell()
            await draining
            self._stopping = True
            # What has not been finished in time fails, and they can tell their clients.
            self._service.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await asyncio.gather(*(end.stop() for end in self._ends if end is not None))
        finally:
            self._stopping = True
            announcing.cancel()
            # Those that did not end by themselves end now, for their channels close.
            done, late = await asyncio.wait(keeping, timeout=END_SECONDS)
            for task in late:
                task.cancel()
            await asyncio.gather(announcing, *keeping, return_exceptions=True)
            for one in self._listening:
                one.close()
        for task in (*done, announcing):
            if not task.cancelled():
                task.result()

    async def up(self) -> None:
        """Wait until every process takes requests."""
        for ready in self._ready:
            await ready.wait()

    @functools.cached_property
    def _model(self) -> Model:
        try:
            return described(self._config.model, self._service.created, self._service.loaded)
        except Exception as error:  # The tokenizers package raises nothing more special.
            raise ProcessError(f"this tokenizer cannot be had in several processes: {error}") from error

    async def _announce(self, stop: asyncio.Event) -> None:
        while self._service.state in (State.LOADING, State.WARMING):
            self._tell()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await stop.wait()
                return
        self._tell()
        await stop.wait()

    def _tell(self) -> None:
        for end in self._ends:
            if end is not None:
                end.announce()

    async def _keep(self, number: int) -> None:
        """Start a process, and another one when it ends."""
        failures = 0
        while not self._stopping:
            try:
                followed, status = await self._run(number)
            except OSError as error:
                raise ProcessError(f"no HTTP process can be started: {error}") from error
            if self._stopping or self._service.state is State.DRAINING:
                return
            failures = 0 if followed else failures + 1
            if failures == ATTEMPTS:
                raise ProcessError(f"{ATTEMPTS} HTTP processes in a row ended at their start, the last with {status}")
            logger.warning("an HTTP process ended with %s; starting another", status)

    async def _run(self, number: int) -> tuple[bool, int]:
        """Start a process and serve it to its end; whether it came so far as to follow, and its exit status."""
        ours, theirs = socket.socketpair()
        listening = self._listening[number]
        with theirs:
            handed = (theirs.fileno(), listening.fileno())
            process = await asyncio.create_subprocess_exec(
                *python_command(self._module), *map(str, handed), pass_fds=handed, **APART
            )
        channel = await Channel.over(ours, limit=self._largest)
        end = self._ends[number] = EngineEnd(self._service, channel, lambda: self._model, self._ready[number])
        try:
            channel.send(Kind.SETTINGS, 0, msgspec.to_builtins(self._config, enc_hook=str))
            await end.serve()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_SECONDS):
                    await process.wait()
        finally:
            self._ends[number] = None
            channel.close()
            if process.returncode is None:
                logger.error("the HTTP process %d did not end by itself", process.pid)
                process.kill()
            status = await process.wait()
        return end.follows.is_set(), status

    @property
    def _largest(self) -> int:
        config = self._config
        return 4 * config.max_request_tokens + 20 * config.max_client_batch_size + SLACK_BYTES
