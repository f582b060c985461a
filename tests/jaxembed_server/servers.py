"""A real server in a process of its own, as an operator starts it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable

import openai


class Server:
    """`python -m jaxembed_server` on a free port, or another module that takes the same flags.

    Attributes:
        url: where it listens; set once it is ready.
        output: everything it printed, standard output and standard error together.
    """

    def __init__(self, *flags: str, module: str = "jaxembed_server", **environment: str) -> None:
        self.url = ""
        self.output = ""
        self._ready = threading.Event()
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "XLA_FLAGS": "", **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if found := re.search(r"ready at (http://\S+)", line):
                self.url = found.group(1)
                self._ready.set()
        self._ready.set()

    def wait_until_ready(self, seconds: float = 180) -> "Server":
        assert self._ready.wait(seconds), f"not ready in {seconds} s:\n{self.output}"
        assert self.url, f"ended with {self.process.wait()}:\n{self.output}"
        return self

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            return response.read()

    def wait_until(self, holds: Callable[[], bool], seconds: float = 30) -> None:
        """Ask again and again until something about the server holds."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"still not so after {seconds} s:\n{self.output}"
            time.sleep(0.02)

    def client(self, key: str = "unused") -> openai.OpenAI:
        """The official client; to be used in a `with`."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(60)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status
