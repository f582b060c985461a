"""Better shapes while serving: counts the lengths that come, and has the engine's ladder refined in a thread beside.

The server starts with few shapes and is ready soon. After so many inputs the shapes are chosen by what came, compiled,
and swapped in: no request waits for that, and a failure leaves everything as it was. Knows neither HTTP nor JAX.
"""

import logging
import threading
from collections.abc import Iterable

from jaxembed.refinement import Histogram, Refinable, refine

__all__ = ["Refiner"]

logger = logging.getLogger(__name__)

AGAIN = 10
"""The next look comes after so many times as many inputs: what comes later changes the picture less and less."""


class Refiner:
    """Watches the lengths of inputs; call `close` at the end.

    Args:
        engine: its ladder is refined.
        after: inputs before the first look; 0 never looks.
    """

    def __init__(self, engine: Refinable, *, after: int) -> None:
        self._engine = engine
        self._seen = Histogram(engine.ladder.max_length)
        self._count = 0
        self._next = after
        self._changed = threading.Condition()
        self._closed = False
        if after:
            threading.Thread(target=self._work, name="refine-ladder", daemon=True).start()

    def saw(self, lengths: Iterable[int]) -> None:
        """Count inputs. Safe to call from any thread."""
        if not self._next:
            return
        lengths = list(lengths)
        self._seen.add(lengths)
        with self._changed:
            self._count += len(lengths)
            if self._count >= self._next:
                self._changed.notify()

    def close(self) -> None:
        """Look no more; what is being compiled is compiled to its end."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._count >= self._next)
                if self._closed:
                    return
                self._next = self._count * AGAIN
            try:
                found = refine(self._engine, self._seen.counts)
            except Exception:  # Whatever a compiler raises: the old ladder serves on.
                logger.exception("the ladder could not be refined")
            else:
                logger.info("the ladder after %d inputs: %s", self._count, found or "as before")
