"""The command line: `jaxembed serve [MODEL]`. Prints for a person; everything else logs."""

import argparse
import asyncio
import dataclasses
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from logging.handlers import QueueHandler, QueueListener
from typing import Any

from hypercorn.config import Config as HypercornConfig
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from jaxembed_server.app import create_app, service_of
from jaxembed_server.batcher import DEVICE_THREAD
from jaxembed_server.config import ENV_PREFIX, ConfigError, ServerConfig, from_sources
from jaxembed_server.connection import serve
from jaxembed_server.exchange import access
from jaxembed_server.metrics import Metrics
from jaxembed_server.model import Loader, load_model
from jaxembed_server.refiner import REFINER_THREAD
from jaxembed_server.service import LOADER_THREAD, Service, State
from jaxembed_server.supervisor import ProcessError, Supervisor, listening_sockets

__all__ = ["main", "parser", "run"]

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75.0

AT_WORK = (LOADER_THREAD, REFINER_THREAD, DEVICE_THREAD)
"""How the names of the threads begin that may be at work in XLA when the server ends."""

WAITING_LINES = 10_000
"""Lines of the access log that may wait to be written, some 10 MB."""

GRACE = 0.1
"""Seconds that each of them has to end by itself: one that only waited does."""


def parser() -> argparse.ArgumentParser:
    """The command line, made from the fields of ServerConfig."""
    top = argparse.ArgumentParser(prog="jaxembed", description="A text-embedding server on JAX.")
    top.add_argument("--version", action="version", version=version("jaxembed"))
    commands = top.add_subparsers(dest="command", required=True)
    serve = commands.add_parser(
        "serve",
        help="serve a model",
        description="Serve a model at POST /v1/embeddings, as OpenAI's API does. "
        f"Every flag can also be given as an environment variable, {ENV_PREFIX}PORT for --port and so on; flags win.",
    )
    for field in dataclasses.fields(ServerConfig):
        shown = f"{field.metadata['help']}{default_of(field)}"
        if field.name == "model":
            serve.add_argument("model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help=shown)
            continue
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": shown, "metavar": "VALUE"}
        if isinstance(field.default, bool):
            # Given alone it means true.
            options |= {"nargs": "?", "const": "true"}
        serve.add_argument("--" + field.name.replace("_", "-"), **options)
    return top


def default_of(field: "dataclasses.Field[Any]") -> str:
    """The default as a note behind the help; nothing where the help says it."""
    value = field.default
    if value is None or value == ():
        return ""
    return f" (default: {str(value).lower() if isinstance(value, bool) else value})"


def main(argv: Sequence[str] | None = None, loader: Loader = load_model) -> int:
    """Run the command line.

    Args:
        argv: the command line.
        loader: makes the model; another than the real one only in tests.

    Returns:
        0 after a clean shutdown; 1 if the model cannot be served; 2 for a setting that is not possible.
    """
    flags = vars(parser().parse_args(argv))
    del flags["command"]
    try:
        config = from_sources(flags, os.environ)
    except ConfigError as error:
        print(f"jaxembed: {error}", file=sys.stderr)
        return 2
    earlier = set(threading.enumerate())
    with logging_to_stderr(config), asyncio.Runner(loop_factory=event_loop()) as runner:
        status = runner.run(run(config, loader))
    at_work = [one for one in threading.enumerate() if one.name.startswith(AT_WORK) and one not in earlier]
    for thread in at_work:
        thread.join(GRACE)
    if any(thread.is_alive() for thread in at_work):
        # What they do in XLA cannot be interrupted, and nobody waits for it any more. Were the interpreter to end
        # beside them, it would abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


@contextmanager
def logging_to_stderr(config: ServerConfig) -> Iterator[None]:
    """Ours at the level asked for, everybody else's from a warning upwards.

    Lines of the access log are written by a thread of their own, the last of them at the end: a terminal that is slow
    to take them holds up no request. One that takes none loses all lines beyond `WAITING_LINES`.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for package in ("jaxembed", "jaxembed_server"):
        logging.getLogger(package).setLevel(config.log_level.upper())
    if not config.access_log:
        yield
        return
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    handler = BoundedQueueHandler(lines)
    listener = QueueListener(lines, *logging.getLogger().handlers)
    access.addHandler(handler)
    access.propagate = False
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        access.removeHandler(handler)
        access.propagate = True
        if handler.left_out:
            logger.warning("%d lines of the access log were left out: nobody took them", handler.left_out)


class BoundedQueueHandler(QueueHandler):
    """Leaves out what is logged while `WAITING_LINES` records wait to be written.

    Attributes:
        left_out: how many so far.
    """

    def __init__(self, records: "queue.SimpleQueue[logging.LogRecord]") -> None:
        super().__init__(records)
        self._records = records
        self.left_out = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        """Let a record wait, or leave it out."""
        if self._records.qsize() < WAITING_LINES:
            super().enqueue(record)
        else:
            self.left_out += 1


def event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed, else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def run(config: ServerConfig, loader: Loader = load_model) -> int:
    """Serve until SIGINT or SIGTERM, then let the work in flight finish.

    Returns:
        The exit status.
    """
    settings = hypercorn_settings(config)
    try:
        sockets = settings.create_sockets()
        url = address(config, sockets.insecure_sockets[0])
        if config.http_processes:
            shared = listening_sockets(sockets.insecure_sockets[0], config.http_processes, BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        print(f"jaxembed: cannot listen on {config.host}:{config.port}: {reason}", file=sys.stderr)
        return 1
    supervisor = None
    if config.http_processes:
        service = Service(config, Metrics(), loader)
        supervisor = Supervisor(config, service, shared)
    else:
        app = create_app(config, loader)
        service = service_of(app)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    watching = loop.create_task(watch(service, url, stop, supervisor.up if supervisor else None))

    async def until_stopped() -> None:
        await stop.wait()
        for number in (signal.SIGINT, signal.SIGTERM):
            # A second signal ends the process at once.
            loop.remove_signal_handler(number)
        if service.state is State.READY:
            print("shutting down: finishing the work in flight", file=sys.stderr)
        await service.drain()

    failed = False
    if supervisor is None:
        await serve(app, settings, sockets, until_stopped)
    else:
        loading = loop.create_task(service.start())
        try:
            await supervisor.serve(stop, until_stopped)
        except ProcessError as error:
            print(f"jaxembed: {error}", file=sys.stderr)
            failed = True
        loading.cancel()
    await watching
    return 1 if failed or service.failure is not None else 0


def hypercorn_settings(config: ServerConfig) -> HypercornConfig:
    """Hypercorn's own settings: one process, since one process holds the device."""
    settings = HypercornConfig()
    host = f"[{config.host}]" if ":" in config.host else config.host
    settings.bind = f"{host}:{config.port}"
    settings.backlog = BACKLOG
    settings.keep_alive_timeout = KEEP_ALIVE_SECONDS
    settings.keep_alive_max_requests = sys.maxsize
    settings.include_server_header = False
    # Its log has a line for each start and each broken connection; ours says what matters.
    settings.loglevel = "WARNING"
    return settings


def address(config: ServerConfig, listening: socket.socket) -> str:
    """The URL a person on this machine would open."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.host, config.host)
    return f"http://{f'[{host}]' if ':' in host and '[' not in host else host}:{listening.getsockname()[1]}"


async def watch(
    service: Service, url: str, stop: asyncio.Event, up: Callable[[], Coroutine[Any, Any, None]] | None = None
) -> None:
    """Show how the start goes; at its end print the address, or why it failed and stop.

    Args:
        service: what starts.
        url: the address.
        stop: ends the server.
        up: waits for what must have started beside the service.
    """
    print(f"loading {service.config.model}", file=sys.stderr)
    bar: Any = None
    with logging_redirect_tqdm():
        while service.state in (State.LOADING, State.WARMING) and not stop.is_set():
            if service.buckets and bar is None:
                bar = tqdm(total=service.buckets, desc="compiling", unit="shape")
            if bar is not None and service.warmed > bar.n:
                bar.update(service.warmed - bar.n)
            # For the eyes alone: nothing waits for this.
            await asyncio.sleep(0.1)
        if bar is not None:
            bar.update(service.warmed - bar.n)
            bar.close()
    if service.failure is not None:
        print(f"jaxembed: cannot serve {service.config.model}: {service.failure}", file=sys.stderr)
        stop.set()
    elif service.state is State.READY:
        if up is not None:
            await first(stop.wait(), up())
            if stop.is_set():
                return
        print(greeting(service, url), flush=True)


async def first(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait for one of these, and give the others up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


def greeting(service: Service, url: str) -> str:
    """What a person needs next."""
    body = json.dumps({"model": service.config.names[0], "input": "The quick brown fox jumps over the lazy dog"})
    key = " \\\n  -H 'Authorization: Bearer YOUR_KEY'" if service.config.api_key else ""
    return (
        f"\njaxembed is ready at {url} (documentation: {url}/docs). Try:\n\n"
        f"curl {url}/v1/embeddings \\\n  -H 'Content-Type: application/json'{key} \\\n  -d '{body}'\n"
    )
