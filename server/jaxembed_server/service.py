"""What the routes talk to: one model's life in the server, and one request's way through it.

loading -> warming -> ready -> draining; or failed. Loading and compiling run in a thread: the server answers /health
and /ready meanwhile, and refuses the rest with 503.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jaxembed.errors import InputError, NonFiniteError
from jaxembed.inputs import choose_prompt, task_number
from jaxembed.matryoshka import Policy
from jaxembed.types import Encoding
from jaxembed_server.batcher import Batcher
from jaxembed_server.config import ServerConfig
from jaxembed_server.deadlines import Deadlines
from jaxembed_server.errors import DeadlineError, NotReadyError, invalid
from jaxembed_server.metrics import Metrics
from jaxembed_server.model import Loaded, Loader, load_model
from jaxembed_server.refiner import Refiner
from jaxembed_server.schemas import EmbeddingRequest

__all__ = ["LOADER_THREAD", "Service", "State"]

logger = logging.getLogger(__name__)

TOKENIZER_THREADS = 2
LOADER_THREAD = "load-model"

INLINE_EFFORT = 512
"""A request with no more than this to do is tokenised on the event loop. That takes it half a millisecond at the worst
(where each character is a token) and 0.03 ms for a short query; the way to a thread and back costs more than that, and
with other threads awake each step of it may have to wait for the interpreter's lock."""

ITEM_EFFORT = 16
"""What an input costs beside its length, in characters."""


class State(StrEnum):
    """Where the server is in its life."""

    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Queue(Protocol):
    """What a request's rows are given to: a Batcher, or what leads to one in another process."""

    @property
    def queued_tokens(self) -> int:
        """Tokens of all requests that are in."""

    async def submit(
        self, encodings: Sequence[Encoding], *, dimensions: int, normalize: bool, priority: int = 0
    ) -> npt.NDArray[np.float32]:
        """Vectors of a request's rows, as `Batcher.submit`."""

    async def drain(self) -> None:
        """Take no more requests and wait for those that are in."""

    def close(self) -> None:
        """Stop at once."""


class Service:
    """One model, served.

    Args:
        config: the settings.
        metrics: counts what happens.
        loader: makes the model; another than the real one only in tests.

    Attributes:
        state: where the server is in its life.
        warmed, buckets: how many shapes of how many are compiled.
        failure: why the state is FAILED.
        created: when the model was loaded, in seconds since 1970.
    """

    def __init__(self, config: ServerConfig, metrics: Metrics, loader: Loader = load_model) -> None:
        self.config = config
        self.metrics = metrics
        self.state = State.LOADING
        self.warmed = self.buckets = 0
        self.failure: Exception | None = None
        self.created = int(time.time())
        self._loader = loader
        self._loaded: Loaded | None = None
        self._batcher: Queue | None = None
        self._refiner: Refiner | None = None
        self._deadlines = Deadlines(config.request_timeout)
        self._tokenizing = ThreadPoolExecutor(TOKENIZER_THREADS, thread_name_prefix="tokenize")
        metrics.watch(
            queued=lambda: self._batcher.queued_tokens if self._batcher else 0,
            ready=lambda: float(self.state is State.READY),
            buckets=lambda: len(self._loaded.engine.compiled) if self._loaded else self.warmed,
        )

    @property
    def loaded(self) -> Loaded:
        """The model.

        Raises:
            NotReadyError: there is none yet, or the server is shutting down.
        """
        if self.state is not State.READY or self._loaded is None:
            raise NotReadyError(self.state.value)
        return self._loaded

    async def start(self) -> None:
        """Load and warm the model. Returns when ready or failed: see `state` and `failure`."""
        try:
            self._loaded = await self._load()
            engine = self._loaded.engine
            self._batcher = Batcher(engine, max_queue_tokens=self.config.max_queue_tokens, observer=self.metrics.batch)
            self._refiner = Refiner(
                engine, self._loaded.buckets, after=self.config.refine_after, ahead=self._loaded.ahead
            )
        except Exception as error:  # Whatever it was, the command line reports it and the server stops.
            self.failure = error
            self.state = State.FAILED
            return
        self.created = int(time.time())
        if self.state is not State.DRAINING:
            self.state = State.READY

    async def _load(self) -> Loaded:
        """Run the loader in a thread that does not keep the process alive: a stop while loading is a stop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Loaded] = loop.create_future()

        def settle(loaded: Loaded | None, error: Exception | None) -> None:
            if future.done():
                return
            if loaded is not None:
                future.set_result(loaded)
            else:
                future.set_exception(error or RuntimeError("the loader returned nothing"))

        def work() -> None:
            loaded, failure = None, None
            try:
                loaded = self._loader(self.config, self._progress)
            except Exception as error:  # It goes to the future, and so to whoever awaits it.
                failure = error
            with contextlib.suppress(RuntimeError):  # The loop may be closed by now.
                loop.call_soon_threadsafe(settle, loaded, failure)

        threading.Thread(target=work, name=LOADER_THREAD, daemon=True).start()
        return await future

    def _progress(self, done: int, total: int) -> None:
        self.warmed, self.buckets = done, total
        if self.state is State.LOADING:
            self.state = State.WARMING

    async def drain(self) -> None:
        """Refuse new requests and wait for those that are in, at most `drain_timeout` seconds."""
        self.state = State.DRAINING
        if self._batcher is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.drain_timeout):
                    await self._batcher.drain()

    def close(self) -> None:
        """Stop; requests that are still waiting fail with 503."""
        if self.state is not State.FAILED:
            self.state = State.DRAINING
        if self._refiner is not None:
            self._refiner.close()
        if self._batcher is not None:
            self._batcher.close()
        self._tokenizing.shutdown(wait=False, cancel_futures=True)

    def name(self, asked: str) -> str:
        """The name to answer with, for the name asked for ("" for the default).

        Raises:
            ApiError: 404, unknown model.
        """
        names = self.config.names
        if not asked:
            return names[0]
        if asked not in names:
            listed = ", ".join(repr(name) for name in names)
            message = f"model is {asked[:200]!r}, which is not served here; served: {listed}"
            raise invalid("model", "model_not_found", message, status=404)
        return asked

    async def embed(self, request: EmbeddingRequest) -> tuple[npt.NDArray[np.float32], int]:
        """Vectors of a request.

        Returns:
            float32 [n, d], finite; and the tokens that were run.

        Raises:
            ApiError, JaxembedError: the cases of the API's error table.
        """
        loaded = self.loaded
        try:
            with self._deadlines.timeout():
                size = self._dimensions(request, loaded)
                encodings = await self._tokenize(request, loaded)
                tokens = sum(map(len, encodings))
                limit = self.config.max_request_tokens
                if tokens > limit:
                    raise invalid(
                        "input", "max_tokens_per_request", f"input has {tokens} tokens in all; allowed: at most {limit}"
                    )
                unit = loaded.checkpoint.normalize if request.normalize is None else request.normalize
                assert self._batcher is not None
                vectors = await self._batcher.submit(
                    encodings, dimensions=size, normalize=unit, priority=request.priority
                )
        except TimeoutError:
            raise DeadlineError(self.config.request_timeout) from None
        if not np.isfinite(vectors).all():
            raise NonFiniteError(np.flatnonzero(~np.isfinite(vectors).all(axis=1)).tolist())
        return vectors, tokens

    async def submit(
        self, encodings: Sequence[Encoding], *, dimensions: int, normalize: bool, priority: int = 0
    ) -> npt.NDArray[np.float32]:
        """Vectors of what another process has tokenised, as `Batcher.submit`.

        Raises:
            NotReadyError: there is no model yet, or the server is shutting down.
        """
        if self.state is not State.READY or self._batcher is None:
            raise NotReadyError(self.state.value)
        if self._refiner is not None:
            self._refiner.saw(map(len, encodings))
        return await self._batcher.submit(encodings, dimensions=dimensions, normalize=normalize, priority=priority)

    async def metrics_page(self) -> bytes:
        """What GET /metrics tells."""
        return self.metrics.page()

    def _dimensions(self, request: EmbeddingRequest, loaded: Loaded) -> int:
        if request.dimensions is None:
            # A `truncate_dim` beyond the size cuts nothing.
            return min(loaded.checkpoint.dimensions or loaded.engine.dimension, loaded.engine.dimension)
        trained = loaded.matryoshka.check(request.dimensions)
        if not trained and loaded.matryoshka.policy is Policy.WARN:
            logger.warning("dimensions is %d, for which this model is not known to be trained", request.dimensions)
        return request.dimensions

    async def _tokenize(self, request: EmbeddingRequest, loaded: Loaded) -> list[Encoding]:
        """Encodings of the inputs, made off the event loop unless there is little to do."""
        tokenizer = loaded.tokenizer
        asked = request.truncate_prompt_tokens
        cut = tokenizer.max_length if asked == -1 else asked
        if cut is not None and cut > tokenizer.max_length:
            raise invalid(
                "truncate_prompt_tokens",
                "invalid_value",
                f"truncate_prompt_tokens is {cut}; allowed: -1, or 1 to {tokenizer.max_length}",
            )

        # Task adapters go by the names of their prompts.
        task = task_number(loaded.tasks, None, request.prompt_name)
        texts, token_ids, side = request.texts, request.token_ids, request.truncation_side
        prompt = "" if texts is None else choose_prompt(loaded.checkpoint, request.prompt, request.prompt_name)

        def work() -> list[Encoding]:
            if token_ids is not None:
                encodings = tokenizer.encode_ids(token_ids, truncate_to=cut, side=side, task=task)
            else:
                encodings = tokenizer.encode_texts(
                    texts or (),
                    prompt=prompt,
                    add_special_tokens=request.add_special_tokens,
                    truncate_to=cut,
                    side=side,
                    task=task,
                )
            if self._refiner is not None:
                self._refiner.saw(map(len, encodings))
            return encodings

        if effort(texts or token_ids or (), prompt) <= INLINE_EFFORT:
            encodings = work()
        else:
            encodings = await asyncio.get_running_loop().run_in_executor(self._tokenizing, work)
        # Without special tokens a text of white space or control characters alone has no tokens at all.
        for index, encoding in enumerate(encodings):
            if not len(encoding):
                raise InputError(f"input[{index}] has no tokens; it must not be empty", index=index)
        return encodings


def effort(inputs: Sequence[str] | Sequence[Sequence[int]], prompt: str) -> int:
    """How much there is to tokenise, in characters."""
    return sum(map(len, inputs)) + len(inputs) * (len(prompt) + ITEM_EFFORT)
