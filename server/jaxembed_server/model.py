"""The model that is served: what it consists of, and how it is loaded and warmed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from jaxembed import memory
from jaxembed.architecture import FILL_MASK, SEQUENCE_CLASSIFICATION
from jaxembed.checkpoint import Checkpoint
from jaxembed.errors import UnsupportedModelError
from jaxembed.matryoshka import Matryoshka, Policy
from jaxembed.refinement import Ahead, not_ahead
from jaxembed.tokenizer import Tokenizer
from jaxembed.types import Bucket
from jaxembed_server import batcher, refiner
from jaxembed_server.config import ServerConfig

__all__ = ["Loaded", "Loader", "Progress", "load_model"]

logger = logging.getLogger(__name__)


class ServedEngine(batcher.Engine, refiner.Engine, Protocol):
    """What serving needs of an engine."""

    @property
    def compiled(self) -> frozenset[Bucket]:
        """The shapes that are ready."""


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to serve."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    engine: ServedEngine
    matryoshka: Matryoshka
    tasks: Sequence[str] = ()
    """Among which an input may choose, in the order of their numbers."""
    buckets: Sequence[Bucket] = ()
    """The shapes that the engine is to have soon, where it has only a part yet."""
    ahead: Ahead = not_ahead
    """Makes shapes ready elsewhere before the engine compiles them."""


Progress = Callable[[int, int], None]
"""Told how many buckets of how many are compiled."""

Loader = Callable[[ServerConfig, Progress], Loaded]


def load_model(config: ServerConfig, progress: Progress) -> Loaded:
    """Load and warm the model of the settings.

    Raises:
        JaxembedError: the checkpoint, this jaxlib or a compilation is at fault.
        ValueError: a setting does not fit the model.
    """
    # Here: a process that only speaks HTTP needs the rest of this file, and must not import JAX.
    from jaxembed.compile_process import compile_beside
    from jaxembed.embedder import Embedder
    from jaxembed.warmup import cache_folder, use_cache, warm

    use_cache(cache_folder(config.cache_dir))
    chosen = choose_route(Checkpoint.open(config.model, revision=config.revision), config.route)
    check_gives_vectors(chosen)
    embedder = Embedder.from_pretrained(
        chosen,
        dtype=config.dtype,
        max_length=config.max_length,
        max_batch_tokens=config.max_batch_tokens,
    )
    engine = embedder.engine
    # What is only to be loaded can come while the first requests are answered; what must be compiled would take the
    # cores from them for long. Rather than the default shapes, those that an earlier start has chosen.
    known = (engine.kept() if config.refine_after else None, engine.ladder)
    there = [one for one in known if one is not None and all(map(engine.cached, one.buckets))]
    ladder = there[0] if there else engine.ladder
    first = ladder.smallest() if there else ladder
    engine.allow(first)
    total, done = len(first), 0
    progress(done, total)

    def one_more(_: object) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    report = warm(engine, first, progress=one_more)
    engine.adopt(first)
    logger.info("%d shapes in %.1f s, %d from the cache", total, report.seconds, report.cache_hits)
    checkpoint = embedder.model.checkpoint
    matryoshka = Matryoshka.of(
        config.model,
        checkpoint.config,
        embedder.dimension,
        policy=Policy(config.matryoshka),
        override=config.matryoshka_dimensions,
    )
    tasks, ahead = embedder.model.tasks, partial(compile_beside, engine)
    memory.settle()
    return Loaded(checkpoint, embedder.tokenizer, engine, matryoshka, tasks, ladder.buckets, ahead)


def choose_route(checkpoint: Checkpoint, route: str | None) -> Checkpoint:
    """The checkpoint that all inputs go through: of the route asked for, or of the default one.

    Raises:
        ValueError: there is no such route; or none is asked for, and the model has no default one.
    """
    if not checkpoint.routes:
        if route is not None:
            raise ValueError(f"--route is {route!r}, but this model has no routes")
        return checkpoint
    listed = ", ".join(checkpoint.routes)
    chosen = checkpoint.default_route if route is None else route
    if chosen is None:
        raise ValueError(f"this model has no default route: choose one with --route; allowed: {listed}")
    if chosen not in checkpoint.routes:
        raise ValueError(f"--route is {chosen!r}; allowed: {listed}")
    return checkpoint.routes[chosen]


def check_gives_vectors(checkpoint: Checkpoint) -> None:
    """A model must give one vector for a text, and be meant to.

    Raises:
        UnsupportedModelError: it does not; the message says what it gives.
    """
    # A cross-encoder without modules.json looks like an encoder with one layer too many.
    scores = checkpoint.extra.get("model_type") == "CrossEncoder" or "sentence_transformers" in checkpoint.config
    if checkpoint.pooling is not None and not (checkpoint.head == SEQUENCE_CLASSIFICATION and scores):
        return
    given = "a vector for each token"
    if checkpoint.head == SEQUENCE_CLASSIFICATION:
        given = "scores of pairs (a cross-encoder)"
    elif checkpoint.head == FILL_MASK or checkpoint.config["model_type"] == "sparse_static_embedding":
        given = "sparse vectors"
    elif checkpoint.late is not None:
        given = "a vector for each token (late interaction)"
    raise UnsupportedModelError(
        f"this model gives {given}; the server serves models that give one vector for a text. The library has the "
        "others: jaxembed.Embedder"
    )
