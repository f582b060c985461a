"""Fixtures with real servers; the class is in servers.py, what stands in for an engine in fakes.py."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from servers import Server


@pytest.fixture(scope="session")
def server_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Executables of the servers of a session, in all of its workers: the second one starts faster."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "server-cache"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def start(server_cache: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends those that a test leaves."""
    servers = []

    def begin(*flags: str, **environment: str) -> Server:
        servers.append(Server("--cache-dir", str(server_cache), *flags, **environment))
        return servers[-1]

    yield begin
    for server in servers:
        server.stop(signal.SIGKILL)


@pytest.fixture(scope="session")
def server(server_cache: Path) -> Iterator[Server]:
    """The default model, served; shared by the session."""
    running = Server("--cache-dir", str(server_cache))
    try:
        yield running.wait_until_ready()
    finally:
        running.stop()
