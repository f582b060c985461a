"""Better shapes while serving: the ladder is completed and refined in a thread beside. Knows neither HTTP nor JAX.

The server starts with few shapes and is ready soon. First come those that it left out because the cache has them, then
those that an earlier run chose. After so many inputs the shapes are chosen by the lengths that came, and compiled. They
are swapped in when all of them are there: no request waits for that, and a failure leaves everything as it was.

No ladder is held here: the engine drops what nobody plans by any more (`jaxembed.engine.Engine.adopt`).
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from jaxembed import memory
from jaxembed.buckets import Ladder
from jaxembed.refinement import Ahead, Histogram, Refinable, not_ahead, price, refine, switch
from jaxembed.types import Bucket

__all__ = ["REFINER_THREAD", "Engine", "Refiner"]

logger = logging.getLogger(__name__)

REFINER_THREAD = "refine-ladder"

SETTLING = 2.0
"""Seconds after which batches planned by the shapes before should have run."""

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
        buckets: the shapes to begin with, where the engine has only a part of them.
        after: inputs before the first look; 0 never looks, nor at what an earlier run chose.
        ahead: called before shapes are compiled.
    """

    def __init__(self, engine: Engine, buckets: Sequence[Bucket] = (), *, after: int, ahead: Ahead = not_ahead) -> None:
        self._engine = engine
        self._buckets = buckets or engine.ladder.buckets
        self._seen = Histogram(engine.ladder.max_length)
        self._count = 0
        self._next = after
        self._ahead = ahead
        self._changed = threading.Condition()
        self._closed = False
        if after or set(self._buckets) != set(engine.ladder.buckets):
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
        changed = self._begin(self._engine.ladder.having(self._buckets))
        kept = self._engine.kept() if self._next else None
        if kept is not None:
            changed |= self._begin(kept)
        elif self._next and self._engine.counted and not self._closed:
            self._price()
        if changed:
            self._tidy()
        while self._next:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._count >= self._next)
                if self._closed:
                    return
                self._next = self._count * AGAIN
            self._refine()
            self._tidy()

    def _price(self) -> None:
        """Plan by what the first shapes take on this machine, and begin with that the next time."""
        with reported("the shapes could not be timed"):
            ladder = price(self._engine)
            self._engine.keep(ladder)
            logger.info("the ladder is priced: %s", ladder.prices)

    def _refine(self) -> None:
        """Choose shapes by what came."""
        with reported("the ladder could not be refined"):
            found = refine(self._engine, self._seen.counts, self._ahead)
            if found is not None:
                self._engine.keep(found)
            # As a string: a record of the log may live long.
            logger.info("the ladder after %d inputs: %s", self._count, "as before" if found is None else str(found))

    def _begin(self, ladder: Ladder) -> bool:
        """Bring up shapes that are known beforehand, unless the engine has them; whether that was to do."""
        if self._closed or ladder.buckets == self._engine.ladder.buckets:
            return False
        with reported(f"the ladder {ladder} could not be brought up"):
            self._ahead(ladder)
            switch(self._engine, ladder)
            logger.info("the ladder to begin with: %s", str(ladder))
        return True

    def _tidy(self) -> None:
        """Give back the memory of compilations, and of the shapes before once nobody runs them; the rest is to stay."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, SETTLING)
        memory.settle()


@contextmanager
def reported(failure: str) -> Iterator[None]:
    """Whatever a compiler or a device raises is logged: the shapes and prices that are there serve on."""
    try:
        yield
    except Exception:  # Nobody above the thread could do more.
        logger.exception("%s", failure)
