"""The facade: Embedder.from_pretrained(...).encode(...). What scripts and notebooks use; it knows nothing of HTTP.

It says what is asked of the model; `runner` has the way of the inputs through tokenizer, plan and engine.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
import scipy
from jax.sharding import Mesh
from tqdm import tqdm

from jaxembed import reranking, sparse
from jaxembed.buckets import Ladder
from jaxembed.checkpoint import Checkpoint
from jaxembed.engine import Engine
from jaxembed.errors import (
    DimensionsError,
    TaskNameError,
    UnsupportedModelError,
)
from jaxembed.inputs import DOCUMENT, QUERY, SIDES, Inputs, choose_prompt, listed, task_number
from jaxembed.late_interaction import TokenVectors, max_similarity
from jaxembed.loading import Placed, load
from jaxembed.model import Model
from jaxembed.runner import Runner
from jaxembed.similarity import compare
from jaxembed.tokenizer import Tokenizer
from jaxembed.types import Encoding, Output

__all__ = ["Embedder"]


class Embedder:
    """A model that turns texts into vectors.

    Args:
        model: the loaded model.
        tokenizer: its tokenizer.
        engine: compiles and runs it, for what the model gives first of all.
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
        self._runner = Runner(model, tokenizer, engine)
        self._token_vectors = TokenVectors(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | Checkpoint,
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
            name: folder or hub id, e.g. "sentence-transformers/all-MiniLM-L6-v2"; or a Checkpoint, as one of `routes`.
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
        checkpoint = name if isinstance(name, Checkpoint) else Checkpoint.open(name, revision=revision)
        placed: Placed = {}

        def one(part: Checkpoint) -> Embedder:
            model = load(part, dtype=dtype, mesh=mesh, max_length=max_length, placed=placed)
            output = next(output for output in Output if output in model.outputs)
            engine = Engine(model, ladder, max_batch_tokens=max_batch_tokens, output=output)
            tokenizer = Tokenizer.from_folder(
                part.folder,
                vocab_size=model.config.vocab_size,
                max_length=min(model.max_length, engine.ladder.max_length),
                lowercase=part.lowercase,
                measure_prompts=part.pooling is not None and not part.pooling.include_prompt,
                bare=not part.special_tokens,
                unknown=part.unknown_tokens,
                markers=[] if part.late is None else list(part.late.markers.values()),
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
            task: which of the model's tasks, or routes, to use, such as "retrieval.query"; a task brings its prompt.
                By default the one that has the prompt's name, else the model without any.
            truncate: cut over-long inputs to `max_length`; False raises.
            show_progress_bar: on standard error.

        Returns:
            float32 [d] for one input, [n, d] for several. Should the model give NaN or Inf, they are there to be seen;
            a server refuses to answer with them.

        Raises:
            InputError: one of its kinds, naming the item; see `jaxembed.errors`.
        """
        if self.routes:
            return self._route(task).encode(
                inputs,
                dimensions=dimensions,
                normalize=normalize,
                prompt_name=prompt_name,
                prompt=prompt,
                truncate=truncate,
                show_progress_bar=show_progress_bar,
            )
        items, single = listed(inputs)
        size = self._dimensions(dimensions)
        tokenize = self._tokenize(items, prompt, prompt_name, task, truncate=truncate)
        result = np.empty((len(items), size), np.float32)
        unit = self.model.checkpoint.normalize if normalize is None else normalize
        with tqdm(total=len(items), desc="encoding", unit="text", disable=not show_progress_bar) as bar:
            for done in self._runner.run(Output.DENSE, items, tokenize, dimensions=size, normalize=unit):
                result[done.items] = done.rows[:, :size]
                bar.update(len(done.items))
        return result[0] if single else result

    def refine(
        self,
        inputs: Inputs,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
    ) -> Ladder:
        """Choose and compile shapes for inputs like these, and use them from now on, if that pays.

        The default ladder is ready soon and pads much. Before a large job, some hundred of its inputs are enough; the
        compilations take half a minute or so.

        Args:
            inputs: a sample, as for `encode`.
            prompt_name, prompt: as for `encode`.

        Returns:
            The ladder in use afterwards.

        Raises:
            InputError: one of its kinds, naming the item.
        """
        items, _ = listed(inputs)
        tokenize = self._tokenize(items, prompt, prompt_name, None, truncate=True)
        return self._runner.refine(Output.DENSE, tokenize(items))

    def encode_query(self, inputs: Inputs, **options: Any) -> npt.NDArray[np.float32]:
        """`encode` with the prompt, task and route named "query", if the model has them and no other is asked for; the
        default prompt is not used."""
        return self.encode(inputs, **self._of_kind(QUERY, options))

    def encode_document(self, inputs: Inputs, **options: Any) -> npt.NDArray[np.float32]:
        """`encode` with the first prompt there is of "document", "passage", "corpus", and the task and route of that
        kind, where the model has them and no other is asked for; the default prompt is not used."""
        return self.encode(inputs, **self._of_kind(DOCUMENT, options))

    def encode_sparse(
        self,
        inputs: Inputs,
        *,
        max_active_dims: int | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        task: str | None = None,
        truncate: bool = True,
        show_progress_bar: bool = False,
    ) -> "scipy.sparse.csr_array":
        """Sparse vectors of texts or token ids, in the order given: a weight for each entry of the vocabulary (SPLADE).

        Args:
            inputs: as in `encode`.
            max_active_dims: how many entries each vector keeps, the largest; by default the model's number, or all.
            prompt_name, prompt: as in `encode`.
            task: "query" or "document": with the prompt and the route of that side, where the model has them and no
                other is asked for; or another of the model's tasks or routes.
            truncate: cut over-long inputs to `max_length`; False raises.
            show_progress_bar: on standard error.

        Returns:
            float32 [n, V], a `scipy.sparse.csr_array`; of one row for a single input.

        Raises:
            UnsupportedModelError: the model gives no sparse vectors.
            InputError: one of its kinds, naming the item; see `jaxembed.errors`.
        """
        if task in SIDES:
            asked = self._of_kind(SIDES[task], {"prompt": prompt, "prompt_name": prompt_name})
            prompt, prompt_name, task = asked["prompt"], asked["prompt_name"], asked["task"]
        if self.routes:
            return self._route(task).encode_sparse(
                inputs,
                max_active_dims=max_active_dims,
                prompt_name=prompt_name,
                prompt=prompt,
                truncate=truncate,
                show_progress_bar=show_progress_bar,
            )
        items, _ = listed(inputs)
        tokenize = self._tokenize(items, prompt, prompt_name, task, truncate=truncate)
        return sparse.encode(
            self._runner, items, tokenize, max_active_dims=max_active_dims, show_progress_bar=show_progress_bar
        )

    def decode_sparse(self, rows: Any, top_k: int | None = None) -> list[list[tuple[str, float]]]:
        """The tokens that sparse vectors give a weight, the largest first.

        Args:
            rows: what `encode_sparse` gave: n vectors, or one.
            top_k: how many of each; by default all.

        Returns:
            n lists of (token, weight).

        Raises:
            InputError: `top_k` is not 1 or more.
        """
        return sparse.decode(rows, self.tokenizer.token, top_k)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels of a model that scores, in the order of their scores."""
        return reranking.label_names(self.model.checkpoint)

    def predict(
        self,
        pairs: Sequence[str] | Sequence[Sequence[str]],
        *,
        activation: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate: bool = True,
        show_progress_bar: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Scores of pairs of texts, in the order given, as a cross-encoder gives them.

        Args:
            pairs: n times (text, text), or a single pair.
            activation: what is done to the logits: "identity", "sigmoid", "softmax", "tanh" or "relu". By default what
                the checkpoint asks for; else sigmoid where the model has one label, and nothing where it has several.
            prompt_name, prompt: as in `encode`; put before the first text of each pair.
            truncate: cut over-long pairs to `max_length`, the longer text first; False raises.
            show_progress_bar: on standard error.

        Returns:
            float32 [n] where the model has one label, else [n, L]; without the first axis for a single pair.

        Raises:
            UnsupportedModelError: the model has no head for classification, or asks for an activation that is not
                implemented.
            InputError: one of its kinds, naming the item; see `jaxembed.errors`.
        """
        items, single = reranking.listed_pairs(pairs)
        text = choose_prompt(self.model.checkpoint, prompt, prompt_name)
        tokenize = partial(self.tokenizer.encode_pairs, prompt=text, truncate_to=self.max_length if truncate else None)
        scores = reranking.score(
            self._runner, items, tokenize, activation=activation, show_progress_bar=show_progress_bar
        )
        if scores.shape[1] == 1:
            scores = scores[:, 0]
        return scores[0] if single else scores

    def classify(
        self,
        inputs: Inputs,
        *,
        activation: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate: bool = True,
        show_progress_bar: bool = False,
    ) -> npt.NDArray[np.float32]:
        """Scores of single texts or token ids for each of `labels`, in the order given.

        Args:
            inputs: as in `encode`.
            activation: as in `predict`; "softmax" gives probabilities of labels of which one is right.
            prompt_name, prompt: as in `encode`.
            truncate: cut over-long inputs to `max_length`; False raises.
            show_progress_bar: on standard error.

        Returns:
            float32 [L] for one input, [n, L] for several.

        Raises:
            UnsupportedModelError: as in `predict`.
            InputError: one of its kinds, naming the item; see `jaxembed.errors`.
        """
        items, single = listed(inputs)
        tokenize = self._tokenize(items, prompt, prompt_name, None, truncate=truncate)
        scores = reranking.score(
            self._runner, items, tokenize, activation=activation, show_progress_bar=show_progress_bar
        )
        return scores[0] if single else scores

    def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        activation: str | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate: bool = True,
        show_progress_bar: bool = False,
    ) -> list[reranking.Ranked]:
        """Documents in the order of their relevance to a query, the most relevant first.

        Args:
            query: a text.
            documents: n texts.
            top_k: how many to give; by default all.
            activation, prompt_name, prompt, truncate, show_progress_bar: as in `predict`; a prompt stands before the
                query.

        Returns:
            min(n, top_k) of `Ranked`: index in `documents`, score, document. Equals stay in the order given.

        Raises:
            UnsupportedModelError: as in `predict`; or the model has several labels, by none of which to rank.
            InputError: one of its kinds, naming the item; see `jaxembed.errors`.
        """
        pairs = reranking.paired(query, documents, top_k)
        self._runner.engine(Output.SCORES)
        if len(self.labels) != 1:
            raise UnsupportedModelError(
                f"the model scores the labels {', '.join(self.labels)}; rerank needs a model with one, predict does not"
            )
        scores = self.predict(
            pairs,
            activation=activation,
            prompt_name=prompt_name,
            prompt=prompt,
            truncate=truncate,
            show_progress_bar=show_progress_bar,
        )
        return reranking.rank([document for _, document in pairs], scores, top_k)

    def encode_tokens(
        self,
        inputs: Inputs,
        *,
        task: str | None = None,
        dimensions: int | None = None,
        normalize: bool | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        truncate: bool = True,
        show_progress_bar: bool = False,
    ) -> npt.NDArray[np.float32] | list[npt.NDArray[np.float32]]:
        """Vectors of the tokens of texts or token ids, in the order given, for `max_similarity` (ColBERT, BGE-M3).

        A model of late interaction says what is added (query expansion) and left out (punctuation). Of other models it
        is the last hidden state at each token, special ones included.

        Args:
            inputs: as in `encode`. Token ids get no prompt and no special tokens; as queries they are expanded.
            task: "query" or "document": with the prompt, the length, the expansion and the route of that side, where
                the model has them; or another of the model's tasks or routes. A text of no task is a document that
                may have the model's own length.
            dimensions: cut vectors to this size before they are normalised; by default the full size.
            normalize: L2-normalise; by default if a model of late interaction does so, and with BGE-M3's layer.
            prompt_name, prompt: as in `encode`; either wins over the side's prompt.
            truncate: cut over-long inputs to what the model takes of that side; False raises.
            show_progress_bar: on standard error.

        Returns:
            float32 [t, E] for one input, a list of n of them for several; t differs.

        Raises:
            UnsupportedModelError: the model gives no vectors of tokens.
            PickledCheckpointError: the layer that makes them is a pickle; the message says how to convert it.
            InputError: one of its kinds, naming the item; see `jaxembed.errors`.
        """
        if self.routes:
            return self._route(task).encode_tokens(
                inputs,
                task=task if task in SIDES else None,
                dimensions=dimensions,
                normalize=normalize,
                prompt_name=prompt_name,
                prompt=prompt,
                truncate=truncate,
                show_progress_bar=show_progress_bar,
            )
        items, single = listed(inputs)
        side, named = (task, None) if task in SIDES else (None, task)
        if side is not None:
            if self.model.checkpoint.late is not None and prompt is None and prompt_name is None:
                # Without a prompt of its own a side has none, whatever the default one is.
                prompt = self.prompts.get(side, "")
            asked = self._of_kind(SIDES[side], {"prompt": prompt, "prompt_name": prompt_name})
            prompt_name, named = asked["prompt_name"], asked["task"]
        text, number = self._prompt_and_task(prompt, prompt_name, named)
        vectors = self._token_vectors.run(
            self._runner,
            items,
            partial(self._token_vectors.encode, task=side, prompt=text, number=number, truncate=truncate),
            task=side,
            dimensions=dimensions,
            normalize=normalize,
            show_progress_bar=show_progress_bar,
        )
        return vectors[0] if single else vectors

    def max_similarity(self, queries: Any, documents: Any) -> npt.NDArray[np.float32]:
        """How alike queries and documents are by the vectors of their tokens (MaxSim); larger is more alike.

        For each vector of the query the largest product with one of the document's, summed; or their mean, where the
        model's measure is "meanmaxsim", and for BGE-M3.

        Args:
            queries: n arrays [t, E], or one, as `encode_tokens` gives them.
            documents: m of them.

        Returns:
            float32 [n, m]; -inf for a document without vectors.

        Raises:
            InputError: an item is no such array, or their sizes differ.
        """
        return max_similarity(queries, documents, mean=self._token_vectors.mean)

    def similarity(self, a: Any, b: Any) -> npt.NDArray[np.float32]:
        """How alike vectors are, by the model's own measure; larger is more alike.

        Args:
            a: [n, d] or [d]; or sparse vectors, as `encode_sparse` gives them.
            b: [m, d] or [d]; sparse where `a` is.

        Returns:
            float32 [n, m]: cosine, dot product, or the negative of the Euclidean or Manhattan distance.

        Raises:
            UnsupportedModelError: the model names another measure; of sparse vectors, one besides cosine and dot.
        """
        if sparse.is_sparse(a) or sparse.is_sparse(b):
            return sparse.compare(a, b, self.model.checkpoint.extra.get("similarity_fn_name") or "dot")
        return compare(a, b, self.model.checkpoint.similarity)

    def _route(self, task: str | None) -> "Embedder":
        """Where inputs of a task go, or those of none."""
        route = self.routes.get(task if task is not None else self.model.checkpoint.default_route or "")
        if route is None:
            raise TaskNameError(task, sorted(self.routes))
        return route

    def _dimensions(self, asked: int | None) -> int:
        # A `truncate_dim` beyond the size cuts nothing.
        size = asked if asked is not None else min(self.model.checkpoint.dimensions or self.dimension, self.dimension)
        if not 1 <= size <= self.dimension:
            raise DimensionsError(f"dimensions is {size}; allowed: 1 to {self.dimension}")
        return size

    def _tokenize(
        self, items: Sequence[Any], prompt: str | None, prompt_name: str | None, task: str | None, *, truncate: bool
    ) -> Callable[[Sequence[Any]], list[Encoding]]:
        """What makes Encodings of a window of the inputs."""
        text, number = self._prompt_and_task(prompt, prompt_name, task)
        limit = self.max_length if truncate else None
        if items and isinstance(items[0], str):
            return partial(self.tokenizer.encode_texts, prompt=text, truncate_to=limit, task=number)
        return partial(self.tokenizer.encode_ids, truncate_to=limit, task=number)

    def _prompt_and_task(self, prompt: str | None, prompt_name: str | None, task: str | None) -> tuple[str, int]:
        """The text to put before an input, and the number of the task."""
        if prompt is None and prompt_name is None and task in self.model.tasks and task in self.prompts:
            # Task adapters were trained with the prompt of the same name.
            prompt_name = task
        return choose_prompt(self.model.checkpoint, prompt, prompt_name), task_number(
            self.model.tasks, task, prompt_name
        )

    def _of_kind(self, names: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
        """Options with the prompt and the task of a kind of input filled in, the first name that there is."""
        options = dict(options)
        if options.get("prompt") is None and options.get("prompt_name") is None:
            options["prompt_name"] = next((name for name in names if name in self.prompts), None)
            # The default prompt is for texts of neither kind.
            options["prompt"] = "" if options["prompt_name"] is None else None
        if options.get("task") is None:
            options["task"] = next((name for name in names if name in (*self.routes, *self.model.tasks)), None)
        return options
