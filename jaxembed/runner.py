"""Inputs in windows -> arrays, for any output of a model: tokenising ahead, planning, running. Knows no public API.

1. The inputs are taken in windows, so that memory does not grow with their number beyond the result itself.
2. A window becomes Encodings; the next window is tokenised while this one runs.
3. `buckets` plans the window into Batches, longest rows first.
4. `engine` runs them, two at a time, but very long rows one at a time; a shape that is met for the first time is
   compiled then (a server compiles all of them ahead).
5. Rows find their items again by the owner index that travels in the Batch.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxembed.buckets import Ladder
from jaxembed.engine import Engine
from jaxembed.errors import InputError, PickledCheckpointError, UnsupportedModelError
from jaxembed.m3 import conversion
from jaxembed.model import Model
from jaxembed.packing import Row, pack
from jaxembed.refinement import Histogram, refine
from jaxembed.tokenizer import Tokenizer
from jaxembed.types import Batch, Encoding, Output

__all__ = ["Done", "Runner"]

WINDOW = 4096
"""Inputs that are tokenised and planned together: enough that sorting by length pays, few enough to stay in memory."""

OFFERED = {
    Output.DENSE: "one vector for a text (encode)",
    Output.TOKENS: "a vector for each token (encode_tokens)",
    Output.SPARSE: "sparse vectors (encode_sparse)",
    Output.SCORES: "scores of texts and pairs (classify, predict, rerank)",
}


class Done(NamedTuple):
    """What one batch gave.

    Attributes:
        items: int64 [n], places of the inputs.
        encodings: n of them.
        rows: float32 [n, ...], of the shape that `Output` says.
    """

    items: npt.NDArray[np.int64]
    encodings: tuple[Encoding, ...]
    rows: npt.NDArray[np.float32]


class Runner:
    """Runs one model, whatever is asked of it.

    Args:
        model: the loaded model.
        tokenizer: its tokenizer.
        engine: for one of its outputs; engines of the others get the same ladder when they are first needed.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, engine: Engine) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._engines = {engine.output: engine}
        # Not the ladder itself: a reference to it keeps its executables (`Engine.adopt`).
        self._buckets = engine.ladder.buckets

    def engine(self, output: Output) -> Engine:
        """The engine of an output.

        Raises:
            UnsupportedModelError: the model does not give it; the message says what it gives.
            PickledCheckpointError: it would, were its layer no pickle; the message says how to convert it.
        """
        # Asked for at every call: what the model gives is a question to its folder.
        found = self._engines.get(output)
        if found is not None:
            return found
        if output not in self.model.outputs:
            pickled = conversion(self.model.checkpoint.folder, output)
            if pickled is not None:
                raise PickledCheckpointError(pickled)
            given = " and ".join(OFFERED[one] for one in Output if one in self.model.outputs) or "nothing"
            raise UnsupportedModelError(f"this model does not give {OFFERED[output]}; it gives {given}")
        return self._engines.setdefault(output, Engine(self.model, Ladder(self._buckets), output=output))

    def refine(self, output: Output, encodings: Sequence[Encoding]) -> Ladder:
        """Choose and compile shapes for inputs like these, and plan by them from now on, if that pays.

        Returns:
            The ladder in use afterwards.

        Raises:
            UnsupportedModelError: the model does not give this output.
        """
        engine = self.engine(output)
        for bucket in engine.ladder.buckets:
            engine.compile(bucket)
        seen = Histogram(engine.ladder.max_length)
        seen.add(map(len, encodings))
        return refine(engine, seen.counts) or engine.ladder

    def run(
        self,
        output: Output,
        items: Sequence[Any],
        tokenize: Callable[[Sequence[Any]], Sequence[Encoding]],
        *,
        dimensions: int,
        normalize: bool,
    ) -> Iterator[Done]:
        """Run inputs, in whatever order is fastest.

        Args:
            output: what to give of each.
            items: the inputs.
            tokenize: makes the Encodings of a window of them; may run in a thread.
            dimensions, normalize: of each row, as in `types.Batch`.

        Raises:
            UnsupportedModelError: the model does not give this output.
            InputError: what `tokenize` raises, its item counted from the start of all inputs.
        """
        engine = self.engine(output)
        for start, encodings in windows(items, tokenize):
            # Referred to until its batches have run (`Engine.adopt`).
            ladder = engine.ladder
            plans = ladder.plan([len(one) for one in encodings])
            alone = [plan for plan in plans if ladder.outsize(plan.bucket)]
            others = [plan for plan in plans if not ladder.outsize(plan.bucket)]
            for group, at_a_time in ((alone, 1), (others, 1 if len(plans) == 1 else engine.side_by_side)):
                batches = (
                    pack(plan.bucket, [Row(encodings[item], dimensions, normalize, item) for item in plan.items])
                    for plan in group
                )
                for batch, rows in ran(engine, batches, at_a_time):
                    yield Done(batch.owners + start, tuple(encodings[item] for item in batch.owners.tolist()), rows)


def ran(engine: Engine, batches: Iterable[Batch], at_a_time: int) -> Iterator[tuple[Batch, npt.NDArray[np.float32]]]:
    """Each batch and what it gave, in order; so many run at a time, each in a thread, but one alone in this one."""

    def compiled() -> Iterator[Batch]:
        for batch in batches:
            # Here and not in a thread: JAX's settings may be this thread's own.
            engine.compile(batch.bucket)
            yield batch

    if at_a_time == 1:
        yield from ((batch, engine.run(batch)) for batch in compiled())
        return
    waiting: deque[tuple[Batch, Future[npt.NDArray[np.float32]]]] = deque()
    with ThreadPoolExecutor(at_a_time, thread_name_prefix="run") as pool:
        for batch in compiled():
            waiting.append((batch, pool.submit(engine.run, batch)))
            # One more than run, so that none of the threads waits for us.
            if len(waiting) > at_a_time:
                batch, result = waiting.popleft()
                yield batch, result.result()
        for batch, result in waiting:
            yield batch, result.result()


def windows(
    items: Sequence[Any], tokenize: Callable[[Sequence[Any]], Sequence[Encoding]]
) -> Iterator[tuple[int, Sequence[Encoding]]]:
    """(offset, Encodings) of each window; one window is tokenised ahead."""

    def work(start: int) -> Sequence[Encoding]:
        try:
            return tokenize(items[start : start + WINDOW])
        except InputError as error:
            raise moved(error, start) from None

    starts = range(0, len(items), WINDOW)
    if len(starts) <= 1:
        # No thread for what has no next window: starting one takes longer than tokenising a query.
        yield from ((start, work(start)) for start in starts)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="tokenize") as pool:
        ahead = pool.submit(work, 0)
        for start in starts:
            encodings = ahead.result()
            if start + WINDOW < len(items):
                ahead = pool.submit(work, start + WINDOW)
            yield start, encodings


def moved(error: InputError, start: int) -> InputError:
    """The same error, its item counted from the start of the whole input in place of the window's."""
    if error.index is not None and start:
        message = str(error).replace(f"input[{error.index}]", f"input[{error.index + start}]", 1)
        error.args = (message,)
        error.index += start
    return error
