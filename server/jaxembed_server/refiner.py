"""Better shapes while serving: the ladder is completed and refined in a thread beside. Knows neither HTTP nor JAX.

The server starts with few shapes and is ready soon. First come those that it left out because the cache has them, then
those that an earlier run chose. After so many inputs the shapes are chosen by the lengths that came, and compiled. They
are swapped in when all of them are there: no request waits for that, and a failure leaves everything as it was.
"""

import logging
import threading
from collections.abc import Iterable
from typing import Protocol

from jaxembed.buckets import Ladder
from jaxembed.refinement import Histogram, Refinable, refine, switch

__all__ = ["REFINER_THREAD", "Engine", "Refiner"]

logger = logging.getLogger(__name__)

REFINER_THREAD = "refine-ladder"

AGAIN = 10
"""The next look comes after so many times as many inputs: what comes later changes the picture less and less."""


class Engine(Refinable, Protocol):
    """An engine that remembers a ladder from start to start; see `jaxembed.engine.Engine`."""

    def keep(self, ladder: Ladder) -> None:
        """Keep a ladder for the next start."""

    def kept(self) -> Ladder | None:
        """The ladder that was kept last."""


class Refiner:
    """Watches the lengths of inputs; call `close` at the end.

    Args:
        engine: its ladder is refined.
        ladder: the one to begin with, where the engine has only a part of it.
        after: inputs before the first look; 0 never looks, nor at what an earlier run chose.
    """

    def __init__(self, engine: Engine, ladder: Ladder | None = None, *, after: int) -> None:
        self._engine = engine
        self._ladder = ladder or engine.ladder
        self._seen = Histogram(engine.ladder.max_length)
        self._count = 0
        self._next = after
        self._changed = threading.Condition()
        self._closed = False
        if after or engine.ladder is not self._ladder:
            threading.Thread(target=self._work, name=REFINER_THREAD, daemon=True).start()

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
        self._begin(self._ladder)
        if not self._next:
            return
        if (kept := self._engine.kept()) is not None:
            self._begin(kept)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._count >= self._next)
                if self._closed:
                    return
                self._next = self._count * AGAIN
            try:
                found = refine(self._engine, self._seen.counts)
                if found is not None:
                    self._engine.keep(found)
            except Exception:  # Whatever a compiler raises: the old ladder serves on.
                logger.exception("the ladder could not be refined")
            else:
                logger.info("the ladder after %d inputs: %s", self._count, found or "as before")

    def _begin(self, ladder: Ladder) -> None:
        """Bring up a ladder that is known beforehand, unless it is the engine's."""
        if self._closed or ladder is self._engine.ladder:
            return
        try:
            switch(self._engine, ladder)
        except Exception:  # Whatever a compiler raises: the shapes that are there serve on.
            logger.exception("the ladder %s could not be brought up", ladder)
        else:
            logger.info("the ladder to begin with: %s", ladder)
