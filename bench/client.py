"""A client that costs little: prepared requests over raw keep-alive connections. Knows only POST and Content-Length."""

import asyncio
import base64
import itertools
import json
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Load", "drive", "exchange", "post", "prepare", "vectors"]

PATH = "/v1/embeddings"


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request under way at most."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._body_start = self._end = 0
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def request(self, prepared: bytes) -> "asyncio.Future[bytes]":
        """Send; the result is the body of a 200, or an error that says what came in its place."""
        self._received.clear()
        self._end = 0
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(prepared)
        return self._answer

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._end:
            head_end = self._received.find(b"\r\n\r\n")
            if head_end < 0:
                return
            head = bytes(self._received[:head_end]).lower()
            mark = head.find(b"content-length:")
            if not head.startswith(b"http/1.1 200") or mark < 0:
                self._settle(RuntimeError(f"the server answered {bytes(self._received[:400])!r}"))
                return
            self._body_start = head_end + 4
            self._end = self._body_start + int(head[mark + 15 :].split(b"\r\n", 1)[0])
        if len(self._received) >= self._end:
            self._settle(bytes(self._received[self._body_start : self._end]))

    def connection_lost(self, error: Exception | None) -> None:
        self._settle(ConnectionError(f"the server closed the connection ({error})"))

    def _settle(self, outcome: bytes | Exception) -> None:
        if self._answer is None or self._answer.done():
            return
        if isinstance(outcome, bytes):
            self._answer.set_result(outcome)
        else:
            self._answer.set_exception(outcome)


class Load:
    """What a spell of load was like.

    Attributes:
        milliseconds: how long each request took.
        seconds: from the first request to the last answer.
        client: CPU seconds of this process.
    """

    def __init__(self, taken: Sequence[float], seconds: float, client: float) -> None:
        self.milliseconds = np.array(taken) * 1e3
        self.seconds = seconds
        self.client = client

    @property
    def rate(self) -> float:
        """Requests per second."""
        return len(self.milliseconds) / self.seconds


def prepare(port: int, model: str, texts: Sequence[str], encoding: str) -> bytes:
    """The bytes of one request."""
    body = json.dumps({"model": model, "input": list(texts), "encoding_format": encoding}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def vectors(body: bytes) -> npt.NDArray[np.float32]:
    """The vectors of an answer, float or base64, put in the order of their `index`."""
    data = sorted(json.loads(body)["data"], key=lambda one: one["index"])
    if isinstance(data[0]["embedding"], str):
        return np.stack([np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in data])
    return np.array([one["embedding"] for one in data], np.float32)


async def _clients(port: int, count: int, run: Callable[[Connection], object]) -> None:
    loop = asyncio.get_running_loop()
    opened = [await loop.create_connection(Connection, "127.0.0.1", port) for _ in range(count)]
    try:
        async with asyncio.TaskGroup() as group:
            for _, connection in opened:
                group.create_task(run(connection))
    finally:
        for transport, _ in opened:
            transport.close()


async def drive(port: int, clients: int, requests: Sequence[bytes], seconds: float) -> Load:
    """Let each client send one request after the other, the next of the list; none begins after `seconds`."""
    waiting = itertools.cycle(requests)
    taken: list[float] = []

    async def run(connection: Connection) -> None:
        while (sent := time.perf_counter()) < deadline:
            await connection.request(next(waiting))
            taken.append(time.perf_counter() - sent)

    start, used = time.perf_counter(), time.process_time()
    deadline = start + seconds
    await _clients(port, clients, run)
    return Load(taken, time.perf_counter() - start, time.process_time() - used)


async def exchange(port: int, clients: int, requests: Sequence[bytes]) -> list[bytes]:
    """Send each request once, `clients` at a time, and return the bodies in the order of the requests."""
    waiting = iter(range(len(requests)))
    bodies = [b""] * len(requests)

    async def run(connection: Connection) -> None:
        for i in waiting:
            bodies[i] = await connection.request(requests[i])

    await _clients(port, clients, run)
    return bodies


async def post(port: int, request: bytes) -> int:
    """The status of one request; 0 if nobody listens."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        line = await reader.readline()
        writer.close()
        return int(line.split()[1])
    except (OSError, IndexError):
        return 0
