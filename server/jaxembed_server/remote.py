"""A Service whose model is in another process: what an HTTP process has in place of an engine.

It tokenises, sends the ids to the engine process and waits for the vectors; admission, order, limits and state are the
engine process's, and stand here as it told them last. Knows neither HTTP nor JAX, and holds no weights.
"""

import asyncio
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import numpy.typing as npt

from jaxembed.checkpoint import Checkpoint
from jaxembed.errors import JaxembedError
from jaxembed.matryoshka import Matryoshka, Policy
from jaxembed.tokenizer import Tokenizer
from jaxembed.types import Encoding
from jaxembed_server.channel import Channel, ChannelError, Failure, Frame, Kind, Model, Status, Submission, pack
from jaxembed_server.config import ServerConfig
from jaxembed_server.errors import NotReadyError, QueueFullError
from jaxembed_server.metrics import Metrics
from jaxembed_server.model import Loaded, ServedEngine
from jaxembed_server.service import Service, State

__all__ = ["RemoteBatcher", "RemoteService"]

logger = logging.getLogger(__name__)

COUNTING_SECONDS = 0.2
"""How long answered requests may wait to be told to the engine process, which counts them."""


class RemoteBatcher:
    """What a Service submits to, at the end of a channel.

    Args:
        channel: leads to the engine process; somebody else receives from it, and calls `settle`.
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._numbers = itertools.count(1)
        self._calls: dict[int, asyncio.Future[bytes]] = {}
        self._tokens = 0
        self._closed = False

    @property
    def queued_tokens(self) -> int:
        """Tokens of the requests of this process that wait for an answer."""
        return self._tokens

    async def submit(
        self, encodings: Sequence[Encoding], *, dimensions: int, normalize: bool, priority: int = 0
    ) -> npt.NDArray[np.float32]:
        """Vectors of a request's rows, float32 [n, dimensions], as `Batcher.submit`. Cancelling drops them there.

        Raises:
            QueueFullError, NotReadyError: the engine process says so, or has gone.
            JaxembedError: whatever else went wrong there; its log has it.
        """
        rows = len(encodings)
        if not rows:
            return np.empty((0, dimensions), np.float32)
        table, ids = pack(encodings)
        self._tokens += len(ids)
        try:
            body = await self.call(Kind.SUBMIT, Submission(rows, dimensions, normalize, priority), table, ids)
        finally:
            self._tokens -= len(ids)
        if len(body) != rows * dimensions * 4:
            raise JaxembedError(f"the engine process gave {len(body)} bytes for {rows} rows of {dimensions}")
        return np.frombuffer(body, np.float32).reshape(rows, dimensions)

    async def call(self, kind: Kind, note: object = None, *bodies: npt.NDArray[Any]) -> bytes:
        """Ask the engine process; the body of its answer. Cancelling tells it."""
        if self._closed:
            raise NotReadyError("shutting down")
        number = next(self._numbers)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer
        self._channel.send(kind, number, note, *bodies)
        try:
            await self._channel.flushed()
            return await answer
        except asyncio.CancelledError:
            self._channel.send(Kind.CANCEL, number)
            raise
        finally:
            del self._calls[number]

    def settle(self, frame: Frame) -> None:
        """Hand an answer to whom it belongs; one that nobody waits for any more is dropped."""
        answer = self._calls.get(frame.call)
        if answer is None or answer.done():
            return
        if frame.kind is Kind.ANSWER:
            answer.set_result(frame.body)
        else:
            answer.set_exception(told(msgspec.msgpack.decode(frame.note, type=Failure)))

    async def drain(self) -> None:
        """Wait for the calls that are under way."""
        await asyncio.gather(*self._calls.values(), return_exceptions=True)

    def close(self) -> None:
        """Fail what waits with NotReadyError."""
        self._closed = True
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(NotReadyError("shutting down"))


class Counting(Metrics):
    """Tells the engine process, a few times a second, of the requests that this one answered: the counts are there."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        self._answered: list[tuple[str, int, float]] = []

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request was answered."""
        if not self._answered:
            asyncio.get_running_loop().call_later(COUNTING_SECONDS, self.tell)
        self._answered.append((route, status, seconds))

    def tell(self) -> None:
        """Tell now."""
        if self._answered:
            self._channel.send(Kind.COUNTED, 0, self._answered)
            self._answered = []


class RemoteService(Service):
    """A Service that follows the engine process.

    Attributes:
        ended: set when the engine process has said to stop, or is gone.
        orphaned: whether it is gone without a word.
    """

    def __init__(self, config: ServerConfig, channel: Channel) -> None:
        self._counting = Counting(channel)
        super().__init__(config, self._counting)
        self._channel = channel
        self._remote = RemoteBatcher(channel)
        self._batcher = self._remote
        self.ended = asyncio.Event()
        self.orphaned = False

    async def start(self) -> None:
        """Follow the engine process until it says to stop, or is gone."""
        try:
            while (frame := await self._channel.receive()) is not None:
                if frame.kind is Kind.STOP:
                    return
                self._take(frame)
            self.orphaned = True
        except (ChannelError, msgspec.MsgspecError) as error:
            logger.error("the engine process sent what cannot be understood: %s", error)
            self.orphaned = True
        finally:
            self.state = State.DRAINING
            # Every answer came before the word to stop: what still waits was asked too late.
            self._remote.close()
            self.ended.set()

    def _take(self, frame: Frame) -> None:
        if frame.kind in (Kind.ANSWER, Kind.FAILED):
            self._remote.settle(frame)
        elif frame.kind is Kind.MODEL:
            model = msgspec.msgpack.decode(frame.note, type=Model)
            self.created, self._loaded = model.created, rebuilt(model)
        elif frame.kind is Kind.STATUS:
            status = msgspec.msgpack.decode(frame.note, type=Status)
            self.state, self.warmed, self.buckets = State(status.state), status.warmed, status.buckets
            self._channel.send(Kind.FOLLOWS, int(self.state is State.READY))
        else:
            raise ChannelError(f"a frame of kind {frame.kind.name}")

    async def metrics_page(self) -> bytes:
        """What GET /metrics tells: of the whole server, since the engine process counts."""
        self._counting.tell()
        return await self._remote.call(Kind.SCRAPE)


def told(failure: Failure) -> JaxembedError:
    """The exception that a failure in the engine process is here."""
    if failure.kind == QueueFullError.__name__:
        return QueueFullError(failure.waiting, failure.limit, failure.retry_after)
    if failure.kind == NotReadyError.__name__:
        return NotReadyError(failure.message, failure.retry_after)
    return JaxembedError(f"{failure.kind}: {failure.message}")


def rebuilt(model: Model) -> Loaded:
    """The model as far as it can be had without weights: its `engine` knows its size and runs nothing."""
    return Loaded(
        checkpoint=Checkpoint(
            name=model.name,
            folder=Path(),
            config={},
            normalize=model.normalize,
            prompts=model.prompts,
            default_prompt_name=model.default_prompt_name,
            dimensions=model.dimensions,
        ),
        tokenizer=Tokenizer.from_description(model.tokenizer),
        engine=cast(ServedEngine, SimpleNamespace(dimension=model.dimension)),
        matryoshka=Matryoshka(model.dimension, model.sizes, model.trained, Policy(model.policy)),
        tasks=model.tasks,
    )
