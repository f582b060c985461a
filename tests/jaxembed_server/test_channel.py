"""The channel between processes, with both ends in one: frames, what is no frame, and calls that end in every way."""

import asyncio
import random
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import run

import msgspec
import numpy as np
import pytest
from fake_server import letters
from fakes import FakeEngine, loaded, vector
from tokenizers.normalizers import Normalizer

from jaxembed import Embedder
from jaxembed.errors import JaxembedError
from jaxembed.tokenizer import Tokenizer
from jaxembed.types import Encoding
from jaxembed_server.channel import HEADER, Channel, ChannelError, Kind, pack, unpack
from jaxembed_server.config import ServerConfig
from jaxembed_server.engine_end import EngineEnd, described
from jaxembed_server.errors import NotReadyError, QueueFullError
from jaxembed_server.http_process import settings_of
from jaxembed_server.metrics import Metrics
from jaxembed_server.model import Loaded
from jaxembed_server.remote import RemoteService
from jaxembed_server.service import Service, State
from jaxembed_server.supervisor import ProcessError, Supervisor, listening_sockets


class Pair:
    """A service, an HTTP process's service, and the ends between them."""

    def __init__(self, engine: FakeEngine, **settings: object) -> None:
        self.engine = engine
        self.config = ServerConfig(refine_after=0, **settings)

    @asynccontextmanager
    async def joined(self) -> AsyncIterator["Pair"]:
        model = Loaded(**{**vars(loaded(self.engine)), "tokenizer": letters()})
        self.service = Service(self.config, Metrics(), lambda config, progress: model)
        await self.service.start()
        ours, theirs = socket.socketpair()
        self.channel = await Channel.over(ours, limit=10_000)
        self.other = await Channel.over(theirs)
        ready = asyncio.Event()
        self.end = EngineEnd(self.service, self.channel, lambda: described("m", 1, self.service.loaded), ready)
        self.remote = RemoteService(self.config, self.other)
        self.serving = asyncio.ensure_future(self.end.serve())
        self.following = asyncio.ensure_future(self.remote.start())
        try:
            await asyncio.wait_for(ready.wait(), 10)
            yield self
        finally:
            self.engine.gate.set()
            self.other.close()
            await asyncio.wait_for(asyncio.gather(self.serving, self.following), 10)
            self.service.close()
            self.remote.close()

    async def ask(self, *rows: tuple[int, ...], dimensions: int = 4) -> np.ndarray:
        encodings = [Encoding(np.array(row, np.int32)) for row in rows]
        return await self.remote.submit(encodings, dimensions=dimensions, normalize=False)

    async def started(self) -> None:
        await asyncio.to_thread(self.engine.started.wait, 10)


def test_encodings_survive() -> None:
    given = [
        Encoding(np.array([5, 6, 7], np.int32), 1, 2, 3, 2),
        Encoding(np.array([8], np.int32)),
    ]
    table, ids = pack(given)
    for one, other in zip(given, unpack(2, table.tobytes() + ids.tobytes()), strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        told = [(it.prompt_length, it.second_start, it.task, it.attended) for it in (one, other)]
        assert told[0] == told[1]


@pytest.mark.parametrize(
    ("rows", "numbers"),
    [(0, []), (1, []), (1, [1, 0, 0, 0]), (1, [2, 0, 0, 0, 0, 7]), (1, [0, 0, 0, 0, 0]), (2, [3, 0, 0, 0, 0] * 2)],
)
def test_encodings_that_do_not_add_up_are_refused(rows: int, numbers: list[int]) -> None:
    with pytest.raises(ChannelError):
        unpack(rows, np.array(numbers, np.int32).tobytes())
    with pytest.raises(ChannelError):
        unpack(1, b"123")


def test_a_tokenizer_is_the_same_in_another_process(minilm: Embedder) -> None:
    texts = ["The quick brown fox", "naïve 東京 \U0001f600", "", "x" * 300, "[MASK] [SEP]"]
    for original in (minilm.tokenizer, letters()):
        other = Tokenizer.from_description(original.description())
        assert other.description() == original.description()
        for cut in (None, 3):
            given, again = (
                one.encode_texts(texts[:3] if cut is None else texts, truncate_to=cut) for one in (original, other)
            )
            assert [one.ids.tolist() for one in given] == [one.ids.tolist() for one in again]


def test_settings_are_the_same_in_another_process(tmp_path: Path) -> None:
    config = ServerConfig(cache_dir=tmp_path, api_key=("a", "b"), matryoshka_dimensions=(), request_timeout=2.5)
    note = msgspec.msgpack.encode(msgspec.to_builtins(config, enc_hook=str))
    assert settings_of(note) == config


def test_a_tokenizer_that_cannot_be_told_is_said() -> None:
    """Not a server that never becomes ready."""

    class Own:
        def normalize(self, text: object) -> None: ...

    tokenizer = letters()
    tokenizer._backend.normalizer = Normalizer.custom(Own())
    model = Loaded(**{**vars(loaded(FakeEngine())), "tokenizer": tokenizer})

    async def main() -> None:
        config = ServerConfig(refine_after=0, http_processes=1)
        service = Service(config, Metrics(), lambda config, progress: model)
        await service.start()
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        supervisor = Supervisor(config, service, listening_sockets(bound, 1, 5))
        with pytest.raises(ProcessError, match="this tokenizer"):
            await asyncio.wait_for(supervisor.serve(asyncio.Event(), service.drain), 60)

    asyncio.run(main())


def test_rows_come_back_to_who_asked() -> None:
    async def main() -> None:
        async with Pair(FakeEngine()).joined() as pair:
            answers = await asyncio.gather(*(pair.ask((n + 1, 2), (n + 1,), dimensions=3) for n in range(50)))
            for n, answer in enumerate(answers):
                np.testing.assert_array_equal(answer, [vector([n + 1, 2])[:3], vector([n + 1])[:3]])
            assert (await pair.ask()).shape == (0, 4)

    asyncio.run(main())


def test_what_the_batcher_refuses_and_what_the_engine_raises_is_told() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with Pair(engine, max_queue_tokens=10).joined() as pair:
            engine.gate.clear()
            first = asyncio.ensure_future(pair.ask((1, 2, 3)))
            await pair.started()
            with pytest.raises(QueueFullError, match="3 tokens are waiting, 10 may") as full:
                await pair.ask((1,) * 8)
            assert full.value.retry_after > 0
            engine.failure = ValueError("broken")
            engine.gate.set()
            with pytest.raises(JaxembedError, match="ValueError: broken"):
                await first
            with pytest.raises(JaxembedError, match="BucketError"):
                await pair.ask((1,) * 17)
            engine.failure = None
            pair.service.state = State.DRAINING
            with pytest.raises(NotReadyError, match="draining"):
                await pair.ask((1,))

    asyncio.run(main())


def test_a_cancelled_call_is_cancelled_there() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with Pair(engine).joined() as pair:
            engine.gate.clear()
            first = asyncio.ensure_future(pair.ask((1, 2)))
            await pair.started()
            second = asyncio.ensure_future(pair.ask((3,)))
            await until(lambda: queued(pair) == 3)
            second.cancel()
            await until(lambda: queued(pair) == 2)
            engine.gate.set()
            np.testing.assert_array_equal(await first, [vector([1, 2])])
            assert engine.rows == 1

    asyncio.run(main())


def test_when_the_http_process_goes_its_rows_are_dropped() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with Pair(engine).joined() as pair:
            engine.gate.clear()
            waiting = [asyncio.ensure_future(pair.ask((1, 2))) for _ in range(5)]
            await until(lambda: queued(pair) == 10)
            pair.other.close()
            await until(lambda: queued(pair) == 0)
            await pair.serving
            for one in waiting:
                with pytest.raises(NotReadyError):
                    await one

    asyncio.run(main())


def test_when_the_engine_process_goes_what_waits_fails() -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with Pair(engine).joined() as pair:
            engine.gate.clear()
            waiting = asyncio.ensure_future(pair.ask((1, 2)))
            await pair.started()
            pair.channel.close()
            with pytest.raises(NotReadyError):
                await waiting
            await pair.following
            assert pair.remote.orphaned
            assert pair.remote.ended.is_set()
            with pytest.raises(NotReadyError):
                await pair.remote.metrics_page()

    asyncio.run(main())


def frame(kind: int, call: int = 0, note: bytes = b"", body: bytes = b"") -> bytes:
    return HEADER.pack(kind, call, len(note), len(body)) + note + body


ONE_ROW = np.array([1, 0, 0, -1, -1, 7], np.int32).tobytes()

GARBAGE = [
    b"\xff" * 100,
    frame(0),
    frame(Kind.SETTINGS),
    HEADER.pack(Kind.SUBMIT, 1, 2**32 - 1, 2**32 - 1),
    HEADER.pack(Kind.SUBMIT, 1, 0, 10_001),
    frame(Kind.SUBMIT, 1, b"\xc1", ONE_ROW),
    frame(Kind.SUBMIT, 1, b"\x94\x01\x04\xc2\xa1a", ONE_ROW),
    frame(Kind.SUBMIT, 1, b"\x94\x02\x04\xc2\x00", ONE_ROW),
    frame(Kind.SUBMIT, 1, b"\x94\x01\x05\xc2\x00", ONE_ROW),
    frame(Kind.SUBMIT, 1, b"\x94\x01\x00\xc2\x00", ONE_ROW),
    frame(Kind.SUBMIT, 1, b"\x94\x01\x04\xc2\x00", ONE_ROW) * 2,
    frame(Kind.COUNTED, 0, b"\x91\x01"),
]


@pytest.mark.parametrize("sent", GARBAGE)
def test_garbage_ends_an_http_process_and_drops_what_it_asked(sent: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with Pair(engine).joined() as pair:
            engine.gate.clear()
            waiting = asyncio.ensure_future(pair.ask((1, 2)))
            await pair.started()
            pair.other._writer.write(sent)
            await asyncio.wait_for(pair.serving, 10)
            assert queued(pair) == 0
            with pytest.raises(NotReadyError):
                await waiting
            engine.gate.set()
            # The engine process goes on.
            answer = await pair.service.submit([Encoding(np.array([7], np.int32))], dimensions=4, normalize=False)
            np.testing.assert_array_equal(answer, [vector([7])])

    asyncio.run(main())
    assert "cannot be understood" in caplog.text


def test_garbage_of_any_kind_hangs_nothing() -> None:
    chance = random.Random(0)

    async def main() -> None:
        for _ in range(100):
            async with Pair(FakeEngine()).joined() as pair:
                kind = chance.choice([*Kind, chance.randrange(256)])
                note, body = chance.randbytes(chance.randrange(30)), chance.randbytes(chance.randrange(60))
                sent = frame(kind, chance.randrange(4), note, body)
                pair.other._writer.write(sent[: chance.randrange(1, len(sent) + 1)])
                await asyncio.sleep(0)
                pair.other._writer.write_eof()
                await asyncio.wait_for(pair.serving, 10)

    asyncio.run(main())


@pytest.mark.parametrize(
    "sent", [b"\xff" * 100, frame(Kind.FOLLOWS), frame(Kind.STATUS, 0, b"\xc1"), frame(Kind.MODEL)]
)
def test_garbage_from_the_engine_process_ends_the_http_process(sent: bytes) -> None:
    async def main() -> None:
        engine = FakeEngine()
        async with Pair(engine).joined() as pair:
            engine.gate.clear()
            waiting = asyncio.ensure_future(pair.ask((1, 2)))
            await pair.started()
            pair.channel._writer.write(sent)
            await asyncio.wait_for(pair.following, 10)
            assert pair.remote.orphaned
            with pytest.raises(NotReadyError):
                await waiting

    asyncio.run(main())


def test_an_http_process_imports_nothing_heavy() -> None:
    code = "import sys, jaxembed_server.http_process; print(*sys.modules)"
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"jax", "jaxlib", "flax", "scipy", "torch", "transformers"} & set(done.stdout.split())


def queued(pair: Pair) -> int:
    batcher = pair.service._batcher
    assert batcher is not None
    return batcher.queued_tokens


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)
