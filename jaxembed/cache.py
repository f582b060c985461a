"""What is kept from one start to the next: compiled executables, prepared tokenizers. Knows neither; it keeps bytes.

Only programs switch it on (`warmup.use_cache`): a library that is imported writes nothing anywhere.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["Cache", "current", "switch"]

logger = logging.getLogger(__name__)

DIGEST = hashlib.sha256
PACKAGES = ("jaxembed", "jax", "jaxlib", "flax", "transformers", "tokenizers")
"""An entry is another one with another version of any of these."""


class Cache:
    """Entries in a folder, each a file of its own. Safe for several threads and several processes.

    Args:
        folder: made when the first entry is written. Whoever may write to it may run code in the processes that read
            it: executables are in it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self, kind: str, key: str) -> bytes | None:
        """An entry; None if there is none, or if it is not whole."""
        try:
            found = self._file(kind, key).read_bytes()
        except OSError:
            return None
        size = DIGEST().digest_size
        content = found[size:]
        return content if DIGEST(content).digest() == found[:size] else None

    def has(self, kind: str, key: str) -> bool:
        """Whether there is such an entry, whole or not."""
        return self._file(kind, key).is_file()

    def write(self, kind: str, key: str, content: bytes) -> None:
        """Keep an entry. A folder that cannot be written to is a warning: the next start will take longer."""
        file = self._file(kind, key)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Renamed when it is whole: another process may be reading, or writing the same.
            handle, name = tempfile.mkstemp(dir=file.parent, prefix=".")
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(DIGEST(content).digest() + content)
                os.replace(name, file)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
        except OSError as error:
            logger.warning("nothing can be kept in the cache folder %s: %s", self.folder, error.strerror)

    def _file(self, kind: str, key: str) -> Path:
        return self.folder / kind / key

    def key(self, *facts: Any) -> str:
        """The name of an entry that depends on these facts, and on this project's code and what it runs on.

        Args:
            facts: whatever JSON, or `repr` where JSON has no form for it, tells apart.
        """
        told = json.dumps([code_digest(), versions(), facts], sort_keys=True, default=repr)
        return DIGEST(told.encode()).hexdigest()


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Of the source of this package: what an older one made may be other than what this one would."""
    root = Path(__file__).parent
    total = DIGEST()
    for file in sorted([*root.rglob("*.py"), *root.rglob("*.cpp"), *root.rglob("*.h")]):
        total.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return total.hexdigest()


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Of the packages that decide what an entry is."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


_current: Cache | None = None


def current() -> Cache | None:
    """The cache of this process; None where it keeps nothing."""
    return _current


def switch(folder: Path | None) -> None:
    """Keep things in a folder from now on; None: keep nothing."""
    global _current
    _current = None if folder is None else Cache(folder)
