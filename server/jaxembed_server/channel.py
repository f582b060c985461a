"""Frames between the engine process and an HTTP process, over one socket pair: what they look like, and no more.

A frame is a header (kind, number of the call, length of the note, length of the body), a note (msgpack) and a body:
raw int32 token ids one way, raw float32 vectors the other. Nothing in a frame is code. Knows neither HTTP nor JAX, nor
what is done with a frame.
"""

import asyncio
import socket
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from jaxembed.errors import JaxembedError
from jaxembed.types import Encoding

__all__ = ["Channel", "ChannelError", "Failure", "Frame", "Kind", "Model", "Status", "Submission", "pack", "unpack"]

HEADER = struct.Struct("<BQII")
READ_AHEAD = 2**20

COLUMNS = 5
"""Of an encoding beside its ids: length, prompt_length, second_start, task, attended."""
ALL = -1
"""`attended` where attention sees every token."""


class ChannelError(JaxembedError):
    """What came is no frame, or not one that may come: the other end is not what it should be."""


class Kind(IntEnum):
    """What a frame is. The first six come from the engine process, the others go to it."""

    SETTINGS = 1
    MODEL = 2
    STATUS = 3
    ANSWER = 4
    FAILED = 5
    STOP = 6
    FOLLOWS = 7
    SUBMIT = 8
    CANCEL = 9
    SCRAPE = 10
    COUNTED = 11


KINDS = frozenset(map(int, Kind))


class Frame(NamedTuple):
    """One message. `call` numbers what is asked and answered; of FOLLOWS it is 1 for ready; else 0."""

    kind: Kind
    call: int = 0
    note: bytes = b""
    body: bytes = b""


class Status(msgspec.Struct, frozen=True):
    """Where the engine process is in its life."""

    state: str
    warmed: int
    buckets: int


class Model(msgspec.Struct, frozen=True):
    """What an HTTP process must know of the model: nothing that is on the device."""

    created: int
    name: str
    tokenizer: dict[str, Any]
    dimension: int
    normalize: bool
    dimensions: int | None
    prompts: dict[str, str]
    default_prompt_name: str | None
    sizes: tuple[int, ...]
    trained: bool
    policy: str
    tasks: tuple[str, ...]


class Submission(msgspec.Struct, frozen=True, array_like=True):
    """A request's rows; their ids are the body."""

    rows: int
    dimensions: int
    normalize: bool
    priority: int


class Failure(msgspec.Struct, frozen=True):
    """Why a call failed. Of what is neither of the first two kinds only the text is told."""

    kind: str
    message: str
    waiting: int = 0
    limit: int = 0
    retry_after: float = 0.0


class Channel:
    """One end.

    Args:
        reader, writer: of the socket.
        limit: bytes that a note and body may have together.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int) -> None:
        self._reader = reader
        self._writer = writer
        self._limit = limit

    @classmethod
    async def over(cls, end: socket.socket, *, limit: int = 2**31) -> "Channel":
        """The end of a socket pair; it is the channel's from now on."""
        end.setblocking(False)
        reader, writer = await asyncio.open_unix_connection(sock=end, limit=READ_AHEAD)
        return cls(reader, writer, limit)

    async def receive(self) -> Frame | None:
        """The next frame; None when the other end has closed.

        Raises:
            ChannelError: what came is no frame.
        """
        try:
            number, call, note, body = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            if note + body > self._limit or number not in KINDS:
                raise ChannelError(f"a frame of kind {number} with {note} + {body} bytes; allowed: {self._limit}")
            rest = await self._reader.readexactly(note + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return Frame(Kind(number), call, rest[:note], rest[note:])

    def send(self, kind: Kind, call: int = 0, note: object = None, *bodies: bytes | npt.NDArray[Any]) -> None:
        """Write a frame; `flushed` waits until it is on its way. Into a closed channel nothing is written."""
        if self._writer.is_closing():
            return
        packed = b"" if note is None else msgspec.msgpack.encode(note)
        parts = [body if isinstance(body, bytes) else np.ascontiguousarray(body).tobytes() for body in bodies]
        self._writer.write(b"".join((HEADER.pack(kind, call, len(packed), sum(map(len, parts))), packed, *parts)))

    async def flushed(self) -> None:
        """Wait until the other end has taken so much that more may be written, or has gone."""
        try:
            await self._writer.drain()
        except ConnectionError:
            return

    def close(self) -> None:
        """Close at once."""
        self._writer.transport.abort()


def pack(encodings: Sequence[Encoding]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Encodings as arrays: int32 [n, COLUMNS], and all ids one behind the other."""
    table = [
        (len(one), one.prompt_length, one.second_start, one.task, ALL if one.attended is None else one.attended)
        for one in encodings
    ]
    ids = encodings[0].ids if len(encodings) == 1 else np.concatenate([one.ids for one in encodings])
    return np.array(table, np.int32), ids.astype(np.int32, copy=False)


def unpack(rows: int, body: bytes) -> list[Encoding]:
    """The encodings of which `pack` made `body`.

    Raises:
        ChannelError: the lengths do not add up.
    """
    if rows < 1 or len(body) % 4 or len(body) < rows * COLUMNS * 4:
        raise ChannelError(f"{len(body)} bytes for {rows} rows")
    numbers = np.frombuffer(body, np.int32)
    table = numbers[: rows * COLUMNS].reshape(rows, COLUMNS).tolist()
    ids = numbers[rows * COLUMNS :]
    if min(row[0] for row in table) < 1 or sum(row[0] for row in table) != len(ids):
        raise ChannelError(f"{len(ids)} token ids for {rows} rows whose lengths do not add up to it")
    encodings, start = [], 0
    for length, prompt, second, task, attended in table:
        encodings.append(
            Encoding(ids[start : start + length], prompt, second, task, None if attended == ALL else attended)
        )
        start += length
    return encodings
