"""Parts of the command line that need no process of their own."""

import logging
import threading
from collections.abc import Iterator

import pytest

from jaxembed_server import cli
from jaxembed_server.config import ServerConfig
from jaxembed_server.exchange import access


class StuckHandler(logging.Handler):
    """A terminal that takes nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.taken, self.go = threading.Event(), threading.Event()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.taken.set()
        self.go.wait()
        self.lines.append(record.getMessage())


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[StuckHandler]:
    """The only handler of the root logger."""
    handler = StuckHandler()
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    yield handler
    handler.go.set()


def test_a_terminal_that_takes_no_lines_holds_nothing_up(stuck: StuckHandler, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is bounded; the rest is left out, and said so once the terminal takes lines again."""
    monkeypatch.setattr(cli, "WAITING_LINES", 50)
    monkeypatch.setattr(access, "level", logging.INFO)
    with cli.logging_to_stderr(ServerConfig(access_log=True)):
        access.info("0")
        # Out of the queue, and stuck.
        assert stuck.taken.wait(30)
        for i in range(1, 200):
            access.info("%d", i)
        stuck.go.set()
    assert stuck.lines == [
        *(str(i) for i in range(51)),
        "149 lines of the access log were left out: nobody took them",
    ]
