"""The facade: Embedder.from_pretrained(...).encode(...). What scripts and notebooks use; it knows nothing of HTTP.

1. The inputs are taken in windows, so that memory does not grow with their number beyond the result itself.
2. `tokenizer` turns a window into Encodings; the next window is tokenised while this one runs.
3. `buckets` plans the window into Batches, longest rows first.
4. `engine` runs them; a shape that is met for the first time is compiled then (a server compiles all of them ahead).
5. Rows go to their places in the result by the owner index that travels in the Batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh
from tqdm import tqdm

from jaxembed.buckets import Ladder, Row, pack
from jaxembed.checkpoint import Checkpoint
from jaxembed.engine import Engine
from jaxembed.errors import (
    DimensionsError,
    InputError,
    InputTypeError,
    PromptNameError,
    TaskNameError,
    UnsupportedModelError,
)
from jaxembed.loading import Model, Placed, load
from jaxembed.tokenizer import TokenIds, Tokenizer
from jaxembed.types import NO_TASK, Encoding

__all__ = ["Embedder", "Inputs", "choose_prompt", "task_number"]

Inputs = str | Sequence[str] | TokenIds | Sequence[TokenIds]

QUERY = ("query", "retrieval.query")
DOCUMENT = ("document", "passage", "corpus", "retrieval.passage")
"""Names under which models keep the prompts and tasks of the two sides of a search."""

WINDOW = 4096
"""Inputs that are tokenised and planned together: enough that sorting by length pays, few enough to stay in memory."""


class Embedder:
    """A model that turns texts into vectors.

    Args:
        model: the loaded model.
        tokenizer: its tokenizer.
        engine: compiles and runs it.
        routes: task ("query", "document") -> the Embedder that inputs of that task go to, where the model has a Router;
            this one is then that of the default route.

    Attributes:
        model, tokenizer, engine, routes: as given.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, engine: Engine, routes: Mapping[str, "Embedder"] | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.engine = engine
        self.routes = routes or {}

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        dtype: str = "float32",
        max_length: int | None = None,
        max_batch_tokens: int | None = None,
        ladder: Ladder | None = None,
        mesh: Mesh | None = None,
        revision: str | None = None,
    ) -> "Embedder":
        """Load a model from a folder, an installed package that carries it, the local hub cache or the hub.

        Args:
            name: folder or hub id, e.g. "sentence-transformers/all-MiniLM-L6-v2".
            dtype: "float32", or "bfloat16" for the matrices.
            max_length: tokens an input may have; by default the model's own number.
            max_batch_tokens: tokens per dispatch and device; by default by platform.
            ladder: the shapes to compile; by default `Ladder.default`.
            mesh: devices, from `jaxembed.make_mesh`; by default all of them, data parallel.
            revision: branch, tag or commit on the hub.

        Raises:
            CheckpointError: the checkpoint is not there, broken, or not supported; see `jaxembed.errors`.
            ValueError: `dtype` or `max_length` is not possible.
        """
        checkpoint = Checkpoint.open(name, revision=revision)
        placed: Placed = {}

        def one(part: Checkpoint) -> Embedder:
            model = load(part, dtype=dtype, mesh=mesh, max_length=max_length, placed=placed)
            engine = Engine(model, ladder, max_batch_tokens=max_batch_tokens)
            tokenizer = Tokenizer.from_folder(
                part.folder,
                vocab_size=model.config.vocab_size,
                max_length=min(model.max_length, engine.ladder.max_length),
                lowercase=part.lowercase,
                measure_prompts=part.pooling is not None and not part.pooling.include_prompt,
                bare=not part.special_tokens,
            )
            return cls(model, tokenizer, engine)

        if not checkpoint.routes:
            return one(checkpoint)
        # Tasks that share a route share its Embedder.
        made: list[tuple[Checkpoint, Embedder]] = []
        routes = {}
        for task, part in checkpoint.routes.items():
            found = next((embedder for known, embedder in made if known is part), None)
            if found is None:
                found = one(part)
                made.append((part, found))
            routes[task] = found
        first = routes[checkpoint.default_route or next(iter(routes))]
        model = replace(first.model, checkpoint=checkpoint)
        return cls(model, first.tokenizer, first.engine, routes)

    @property
    def dimension(self) -> int:
        """D, the full size of a vector."""
        return self.model.dimension

    @property
    def max_length(self) -> int:
        """Tokens an input may have, special tokens included: the model's number, or the ladder's if it is shorter."""
        return self.tokenizer.max_length

    @property
    def prompts(self) -> Mapping[str, str]:
        """Name -> text that is put before an input."""
        return self.model.checkpoint.prompts

    @property
    def params(self) -> dict[str, jax.Array]:
        """The weights by name, for `apply`."""
        return self.model.params

    def apply(self, params: Mapping[str, jax.Array], input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """The model as a pure function that jit, grad and vmap accept; see `Model.apply`.

        Args:
            params: as `params`.
            input_ids: int [B, T].
            attention_mask: int or bool [B, T].

        Returns:
            float32 [B, D].
        """
        return self.model.apply(params, input_ids, attention_mask)

    def encode(
        self,
        inputs: Inputs,
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        task: str | None = None,
        truncate: bool = True,
        show_progress_bar: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Vectors of texts or token ids, in the order given.

        Args:
            inputs: one string; a list of n strings; one list of token ids; or n of them. Token ids are used as they
                are: no prompt, no special tokens.
            dimensions: cut vectors to this size before they are normalised (matryoshka); by default the model's.
            normalize: L2-normalise; by default if the model has a Normalize module.
            prompt_name: which of `prompts` to put before each text.
            prompt: a text to put before each text; wins over `prompt_name`. By default the model's default prompt.
            task: which of the model's tasks, or routes, to use, such as "retrieval.query". By default the one that
                has the prompt's name, else the model without any.
            truncate: cut over-long inputs to `max_length`; False raises.
            show_progress_bar: on standard error.

        Returns:
            float32 [d] for one input, [n, d] for several. Should the model give NaN or Inf, they are there to be seen;
            a server refuses to answer with them.

        Raises:
            InputError: one of its kinds, naming the item; see `jaxembed.errors`.
        """
        if self.routes:
            route = self.routes.get(task if task is not None else self.model.checkpoint.default_route or "")
            if route is None:
                raise TaskNameError(task, sorted(self.routes))
            return route.encode(
                inputs,
                dimensions=dimensions,
                normalize=normalize,
                prompt_name=prompt_name,
                prompt=prompt,
                truncate=truncate,
                show_progress_bar=show_progress_bar,
            )
        if self.model.checkpoint.pooling is None:
            raise UnsupportedModelError("this model gives no single vector for a text: it has no Pooling module")
        items, single = listed(inputs)
        number = task_number(self.model.tasks, task, prompt_name)
        size = self._dimensions(dimensions)
        unit = self.model.checkpoint.normalize if normalize is None else normalize
        text = choose_prompt(self.model.checkpoint, prompt, prompt_name)
        limit = self.max_length if truncate else None
        result = np.empty((len(items), size), np.float32)
        with tqdm(total=len(items), desc="encoding", unit="text", disable=not show_progress_bar) as bar:
            for start, encodings in self._tokenized(items, text, limit, number):
                for owners, vectors in self._run(encodings, size, unit):
                    result[start + owners] = vectors[:, :size]
                    bar.update(len(owners))
        return result[0] if single else result

    def encode_query(self, inputs: Inputs, **options: Any) -> npt.NDArray[np.float32]:
        """`encode` with the prompt, task and route named "query", if the model has them and no other is asked for."""
        return self.encode(inputs, **self._of_kind(QUERY, options))

    def encode_document(self, inputs: Inputs, **options: Any) -> npt.NDArray[np.float32]:
        """`encode` with the first prompt there is of "document", "passage", "corpus", and the task and route of that
        kind, where the model has them and no other is asked for."""
        return self.encode(inputs, **self._of_kind(DOCUMENT, options))

    def similarity(self, a: npt.ArrayLike, b: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """How alike vectors are, by the model's own measure; larger is more alike.

        Args:
            a: [n, d] or [d].
            b: [m, d] or [d].

        Returns:
            float32 [n, m]: cosine, dot product, or the negative of the Euclidean or Manhattan distance.

        Raises:
            UnsupportedModelError: the model names another measure.
        """
        x, y = (np.atleast_2d(np.asarray(vectors, np.float32)) for vectors in (a, b))
        measure = self.model.checkpoint.similarity
        if measure == "cosine":
            return np.asarray(unit_rows(x) @ unit_rows(y).T)
        if measure == "dot":
            return np.asarray(x @ y.T)
        if measure == "euclidean":
            return np.stack([-np.linalg.norm(row - y, axis=1) for row in x])
        if measure == "manhattan":
            return np.stack([-np.abs(row - y).sum(axis=1) for row in x])
        raise UnsupportedModelError(f"similarity_fn_name is {measure!r}; supported: cosine, dot, euclidean, manhattan")

    def _dimensions(self, asked: int | None) -> int:
        size = asked if asked is not None else self.model.checkpoint.dimensions or self.dimension
        if not 1 <= size <= self.dimension:
            raise DimensionsError(f"dimensions is {size}; allowed: 1 to {self.dimension}")
        return size

    def _of_kind(self, names: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
        """Options with the prompt and the task of a kind of input filled in, the first name that there is."""
        options = dict(options)
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt_name"] = next((name for name in names if name in self.prompts), None)
        if options.get("task") is None:
            options["task"] = next((name for name in names if name in (*self.routes, *self.model.tasks)), None)
        return options

    def _tokenized(
        self, items: Sequence[Any], prompt: str, limit: int | None, task: int
    ) -> Iterator[tuple[int, list[Encoding]]]:
        """(offset, Encodings) of each window; one window is tokenised ahead."""

        def tokenize(start: int) -> list[Encoding]:
            window = items[start : start + WINDOW]
            try:
                if isinstance(window[0], str):
                    return self.tokenizer.encode_texts(window, prompt=prompt, truncate_to=limit, task=task)
                return self.tokenizer.encode_ids(window, truncate_to=limit, task=task)
            except InputError as error:
                raise moved(error, start) from None

        starts = range(0, len(items), WINDOW)
        if len(starts) <= 1:
            # No thread for what has no next window: starting one takes longer than tokenising a query.
            yield from ((start, tokenize(start)) for start in starts)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
            ahead = pool.submit(tokenize, 0)
            for start in starts:
                encodings = ahead.result()
                if start + WINDOW < len(items):
                    ahead = pool.submit(tokenize, start + WINDOW)
                yield start, encodings

    def _run(
        self, encodings: Sequence[Encoding], size: int, unit: bool
    ) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """(owners [n], vectors [n, D]) of each batch; on accelerators one batch is dispatched ahead."""
        engine = self.engine
        waiting: list[tuple[jax.Array, Any]] = []
        for plan in engine.ladder.plan([len(one) for one in encodings]):
            batch = pack(plan.bucket, [Row(encodings[item], size, unit, item) for item in plan.items])
            engine.compile(batch.bucket)
            waiting.append((engine.dispatch(batch), batch))
            if len(waiting) >= engine.max_in_flight:
                result, finished = waiting.pop(0)
                yield finished.owners, engine.fetch(result, finished)
        for result, finished in waiting:
            yield finished.owners, engine.fetch(result, finished)


def choose_prompt(checkpoint: Checkpoint, prompt: str | None, prompt_name: str | None) -> str:
    """The text to put before an input: `prompt`, else the prompt named, else the default one, else "".

    Raises:
        PromptNameError: the model has no prompt of this name.
    """
    if prompt is not None:
        return prompt
    name = prompt_name if prompt_name is not None else checkpoint.default_prompt_name
    if name is None:
        return ""
    if name not in checkpoint.prompts:
        raise PromptNameError(name, sorted(checkpoint.prompts))
    return checkpoint.prompts[name]


def task_number(tasks: Sequence[str], task: str | None, prompt_name: str | None) -> int:
    """The number of the task asked for: `task`, else the one of the prompt's name, else `NO_TASK`.

    Raises:
        TaskNameError: the model has no task of this name.
    """
    if task is not None:
        if task not in tasks:
            raise TaskNameError(task, sorted(tasks))
        return tasks.index(task)
    return tasks.index(prompt_name) if prompt_name in tasks else NO_TASK


def listed(inputs: Inputs) -> tuple[Sequence[Any], bool]:
    """The inputs as a list of strings or of token-id sequences, and whether it was a single one.

    Raises:
        InputTypeError: neither strings nor token ids, or a mixture.
    """
    if isinstance(inputs, str):
        return [inputs], True
    if isinstance(inputs, np.ndarray):
        return ([inputs], True) if inputs.ndim == 1 and inputs.dtype.kind in "iu" else (list(inputs), False)
    if not isinstance(inputs, Sequence) or isinstance(inputs, (bytes, bytearray)):
        raise InputTypeError(f"the input must be a string, a list of strings or token ids, not {type(inputs).__name__}")
    if inputs and all(isinstance(item, (int, np.integer)) and not isinstance(item, bool) for item in inputs):
        return [inputs], True
    texts = isinstance(inputs[0], str) if inputs else True
    for index, item in enumerate(inputs):
        if isinstance(item, str) is not texts or not isinstance(item, (str, Sequence, np.ndarray)):
            wanted = "a string" if texts else "a list of token ids"
            raise InputTypeError(f"input[{index}] must be {wanted}, not {type(item).__name__}", index=index)
    return inputs, False


def moved(error: InputError, start: int) -> InputError:
    """The same error, its item counted from the start of the whole input in place of the window's."""
    if error.index is not None and start:
        message = str(error).replace(f"input[{error.index}]", f"input[{error.index + start}]", 1)
        error.args = (message,)
        error.index += start
    return error


def unit_rows(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows divided by their L2 norms, which count as at least 1e-12."""
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12), np.float32)
