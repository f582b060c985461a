"""One HTTP process: `python -m jaxembed_server.http_process CHANNEL LISTENING`, two inherited sockets by number.

Started by the engine process and by nobody else. It speaks HTTP and tokenises; the model is at the other end of the
channel. Signals are the engine process's to answer: this one ends when it is told to, with 0, or when the channel
closes, with 1. Never imports JAX.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import Sequence

import msgspec
from hypercorn.config import Sockets

from jaxembed import memory
from jaxembed_server import connection
from jaxembed_server.app import create_app
from jaxembed_server.channel import Channel, Kind
from jaxembed_server.cli import event_loop, hypercorn_settings, logging_to_stderr
from jaxembed_server.config import ServerConfig
from jaxembed_server.remote import RemoteService

__all__ = ["main", "run"]


def main(argv: Sequence[str]) -> int:
    """Run the process; its exit status."""
    # A terminal and a service manager signal the whole group: what is in flight would be lost.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel, listening = (socket.socket(fileno=int(number)) for number in argv)
    with asyncio.Runner(loop_factory=event_loop()) as runner:
        return runner.run(run(channel, listening))


async def run(end: socket.socket, listening: socket.socket) -> int:
    """Serve until the engine process says to stop, or is gone."""
    channel = await Channel.over(end)
    first = await channel.receive()
    if first is None or first.kind is not Kind.SETTINGS:
        print("jaxembed: the engine process ended before it said anything", file=sys.stderr)
        return 1
    config = settings_of(first.note)
    with logging_to_stderr(config):
        return await serve(config, channel, listening)


async def serve(config: ServerConfig, channel: Channel, listening: socket.socket) -> int:
    """Serve as the settings say; the exit status."""
    service = RemoteService(config, channel)
    settings = hypercorn_settings(config)
    app = create_app(config, service=service)
    listening.setblocking(False)

    async def until_ended() -> None:
        await service.ended.wait()

    memory.settle()
    await connection.serve(app, settings, Sockets([], [listening], []), until_ended)
    channel.close()
    if service.orphaned:
        print("jaxembed: the engine process is gone: this HTTP process ends too", file=sys.stderr)
        return 1
    return 0


def settings_of(note: bytes) -> ServerConfig:
    """The settings as the engine process has them; paths travel as texts."""
    return msgspec.msgpack.decode(note, type=ServerConfig, dec_hook=lambda kind, text: kind(text))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
