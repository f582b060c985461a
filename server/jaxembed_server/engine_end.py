"""The engine process's end of a channel: what one HTTP process asks is asked of the Service, and answered.

A call is a task; it is cancelled when the HTTP process cancels it, is gone, or sends what cannot be understood. Knows
neither HTTP, nor how a process is started.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from jaxembed.types import Encoding
from jaxembed_server.channel import Channel, ChannelError, Failure, Frame, Kind, Model, Status, Submission, unpack
from jaxembed_server.errors import NotReadyError, QueueFullError
from jaxembed_server.model import Loaded
from jaxembed_server.service import Service, State

__all__ = ["EngineEnd", "described"]

logger = logging.getLogger(__name__)

Counted = list[tuple[str, int, float]]


class EngineEnd:
    """Serves one HTTP process.

    Args:
        service: holds the model.
        channel: leads to the HTTP process, which has been told the settings.
        describe: gives what it must know of the model, once there is one.
        ready: set when it has said that it takes requests.

    Attributes:
        follows: set when the HTTP process has said that it runs.
    """

    def __init__(self, service: Service, channel: Channel, describe: Callable[[], Model], ready: asyncio.Event) -> None:
        self._service = service
        self._channel = channel
        self._describe = describe
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._status: Status | None = None
        self._dimension = 0
        self.follows = asyncio.Event()
        self._ready = ready

    def announce(self) -> None:
        """Tell where the server is in its life, if that has changed."""
        service = self._service
        if service.state is State.READY and not self._dimension:
            model = self._describe()
            self._channel.send(Kind.MODEL, 0, model)
            self._dimension = model.dimension
        status = Status(service.state.value, service.warmed, service.buckets)
        if status != self._status:
            self._status = status
            self._channel.send(Kind.STATUS, 0, status)

    async def serve(self) -> None:
        """Answer until the HTTP process is gone; what it still waited for is dropped then."""
        self.announce()
        try:
            while (frame := await self._channel.receive()) is not None:
                self._take(frame)
        except (ChannelError, msgspec.MsgspecError) as error:
            logger.error("an HTTP process sent what cannot be understood, and is ended: %s", error)
        finally:
            for task in self._calls.values():
                task.cancel()
            self._channel.close()

    async def stop(self) -> None:
        """Have the HTTP process end, once it has every answer."""
        while self._calls:
            await asyncio.wait(self._calls.values())
        self._channel.send(Kind.STOP)

    def _take(self, frame: Frame) -> None:
        if frame.kind is Kind.SUBMIT:
            asked = msgspec.msgpack.decode(frame.note, type=Submission)
            self._check(frame.call, asked)
            work = self._run(frame.call, unpack(asked.rows, frame.body), asked)
            task = self._calls[frame.call] = asyncio.get_running_loop().create_task(work)
            task.add_done_callback(lambda _: self._calls.pop(frame.call))
        elif frame.kind is Kind.CANCEL:
            # It may have been answered meanwhile.
            if frame.call in self._calls:
                self._calls[frame.call].cancel()
        elif frame.kind is Kind.COUNTED:
            for route, status, seconds in msgspec.msgpack.decode(frame.note, type=Counted):
                self._service.metrics.request(route, status, seconds)
        elif frame.kind is Kind.SCRAPE:
            self._channel.send(Kind.ANSWER, frame.call, None, self._service.metrics.page())
        elif frame.kind is Kind.FOLLOWS:
            self.follows.set()
            if frame.call:
                self._ready.set()
        else:
            raise ChannelError(f"a frame of kind {frame.kind.name}")

    def _check(self, call: int, asked: Submission) -> None:
        """Refuse what would harm more than its own request.

        Raises:
            ChannelError: no HTTP process of ours asks this.
        """
        if call in self._calls:
            raise ChannelError(f"call {call} is under way already")
        if not 1 <= asked.dimensions <= self._dimension:
            raise ChannelError(f"{asked.dimensions} dimensions; allowed: 1 to {self._dimension}")

    async def _run(self, call: int, encodings: Sequence[Encoding], asked: Submission) -> None:
        try:
            vectors = await self._service.submit(
                encodings, dimensions=asked.dimensions, normalize=asked.normalize, priority=asked.priority
            )
        except Exception as error:  # It is told to who asked, and is no other request's concern.
            self._channel.send(Kind.FAILED, call, failure(error))
        else:
            self._channel.send(Kind.ANSWER, call, None, vectors)
        await self._channel.flushed()


def failure(error: Exception) -> Failure:
    """An exception, as an HTTP process is told it."""
    kind = type(error).__name__
    if isinstance(error, QueueFullError):
        return Failure(kind, str(error), error.waiting, error.limit, error.retry_after)
    if isinstance(error, NotReadyError):
        return Failure(kind, error.state, retry_after=error.retry_after)
    return Failure(kind, str(error))


def described(name: str, created: int, loaded: Loaded) -> Model:
    """A model, as an HTTP process is told it."""
    checkpoint, sizes = loaded.checkpoint, loaded.matryoshka
    return Model(
        created=created,
        name=name,
        tokenizer=loaded.tokenizer.description(),
        dimension=loaded.engine.dimension,
        normalize=checkpoint.normalize,
        dimensions=checkpoint.dimensions,
        prompts=dict(checkpoint.prompts),
        default_prompt_name=checkpoint.default_prompt_name,
        sizes=tuple(sizes.sizes),
        trained=sizes.trained,
        policy=sizes.policy.value,
        tasks=tuple(loaded.tasks),
    )
