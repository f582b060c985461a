"""The model that is served: what it consists of, and how it is loaded and warmed."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from jaxembed.checkpoint import Checkpoint
from jaxembed.embedder import Embedder
from jaxembed.matryoshka import Matryoshka, Policy
from jaxembed.tokenizer import Tokenizer
from jaxembed.warmup import cache_folder, use_cache, warm
from jaxembed_server.batcher import Engine
from jaxembed_server.config import ServerConfig

__all__ = ["Loaded", "Loader", "Progress", "load_model"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to serve."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    engine: Engine
    matryoshka: Matryoshka


Progress = Callable[[int, int], None]
"""Told how many buckets of how many are compiled."""

Loader = Callable[[ServerConfig, Progress], Loaded]


def load_model(config: ServerConfig, progress: Progress) -> Loaded:
    """Load and warm the model of the settings.

    Raises:
        JaxembedError: the checkpoint, this jaxlib or a compilation is at fault.
        ValueError: a setting does not fit the model.
    """
    use_cache(cache_folder(config.cache_dir))
    embedder = Embedder.from_pretrained(
        config.model,
        dtype=config.dtype,
        max_length=config.max_length,
        max_batch_tokens=config.max_batch_tokens,
        revision=config.revision,
    )
    total, done = len(embedder.engine.ladder), 0
    progress(done, total)

    def one_more(_: object) -> None:
        nonlocal done
        done += 1
        progress(done, total)

    report = warm(embedder.engine, progress=one_more)
    logger.info("%d shapes in %.1f s, %d from the cache", total, report.seconds, report.cache_hits)
    checkpoint = embedder.model.checkpoint
    matryoshka = Matryoshka.of(
        config.model,
        checkpoint.config,
        embedder.dimension,
        policy=Policy(config.matryoshka),
        override=config.matryoshka_dimensions,
    )
    return Loaded(checkpoint, embedder.tokenizer, embedder.engine, matryoshka)
