"""Compile the ladder ahead: `python -m jaxembed.warmup`. The server uses the same code at start.

Executables and the prepared tokenizer go to a cache folder, so that the next start loads them in place of making them.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache
from tqdm import tqdm

from jaxembed import memory
from jaxembed.buckets import Ladder
from jaxembed.cache import switch
from jaxembed.checkpoint import DEFAULT_MODEL
from jaxembed.engine import Compiled, Engine
from jaxembed.errors import CompileError, JaxembedError
from jaxembed.loading import DTYPES, load
from jaxembed.selftest import check_numerics
from jaxembed.tokenizer_files import read_tokenizer
from jaxembed.types import Bucket

__all__ = ["Report", "cache_folder", "main", "use_cache", "warm"]


@dataclass(frozen=True)
class Report:
    """What a warm-up did.

    Attributes:
        compiled: one entry for each bucket, in the ladder's order.
        seconds: wall time of the whole.
    """

    compiled: tuple[Compiled, ...]
    seconds: float

    @property
    def cache_hits(self) -> int:
        """How many executables came from the cache."""
        return sum(one.cached for one in self.compiled)


def cache_folder(root: Path | None = None) -> Path:
    """Where things are kept, a folder for each jaxlib, so that an old one's can be thrown away.

    Args:
        root: by default `~/.cache/jaxembed`.
    """
    base = Path("~/.cache/jaxembed") if root is None else root
    return base.expanduser() / f"jaxlib-{version('jaxlib')}"


def use_cache(folder: Path | None) -> None:
    """Keep executables and prepared tokenizers in a folder from now on; None keeps nothing.

    This is a setting of the whole process, so only programs call it: the warm-up, the server, the benchmarks.
    """
    # An executable that came out of JAX's own persistent cache cannot be kept in ours. It keeps to the folder that it
    # saw first, unless it is reset.
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    switch(folder)


def warm(
    engine: Engine,
    ladder: Ladder | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[Compiled], None] = lambda _: None,
) -> Report:
    """Check the numerics of this jaxlib, then compile every bucket of the ladder, several at a time.

    Args:
        engine: whose shapes are compiled.
        ladder: which; by default the engine's.
        workers: compilations at a time; by default one a core, at most 8.
        progress: called after each bucket, in the calling thread.

    Raises:
        WrongNumbersError: this jaxlib miscomputes.
        CompileError: names every bucket that failed; the others are ready.
    """
    start = time.perf_counter()
    buckets = (ladder or engine.ladder).buckets
    check_numerics()
    done: dict[Bucket, Compiled] = {}
    failures: dict[str, str] = {}
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), thread_name_prefix="compile") as pool:
        # The largest first: the last one to finish should be a short one.
        pending = {pool.submit(engine.compile, bucket): bucket for bucket in reversed(buckets)}
        for future in as_completed(pending):
            bucket = pending[future]
            try:
                done[bucket] = future.result()
            except Exception as error:  # Any cause counts: a bucket that failed must be named, not lost.
                failures[str(bucket)] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            else:
                progress(done[bucket])
    if failures:
        raise CompileError(failures)
    memory.give_back()
    return Report(tuple(done[bucket] for bucket in buckets), time.perf_counter() - start)


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m jaxembed.warmup`."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxembed.warmup",
        description="Compile every (batch, length) shape of a model ahead, into the cache.",
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--dtype", default=DTYPES[0], choices=DTYPES, help="of the matrices (default: %(default)s)")
    parser.add_argument("--cache-dir", type=Path, default=None, help="folder of the cache (default: ~/.cache/jaxembed)")
    parser.add_argument("--max-length", type=int, default=None, help="tokens an input may have (default: the model's)")
    parser.add_argument(
        "--max-batch-tokens", type=int, default=None, help="tokens a dispatch and device (default: by platform)"
    )
    parser.add_argument("--workers", type=int, default=None, help="compilations at a time (default: one a core)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the warm-up as a program.

    Returns:
        0; 1 if the model cannot be loaded or a bucket failed, after naming it on standard error.
    """
    options = parser().parse_args(argv)
    folder = cache_folder(options.cache_dir)
    use_cache(folder)
    try:
        model = load(options.model, dtype=options.dtype, max_length=options.max_length)
        engine = Engine(model, max_batch_tokens=options.max_batch_tokens)
        print(
            f"{model.checkpoint.name}, {model.dtype}: {len(engine.ladder)} buckets on {engine.platform}; cache {folder}"
        )
        with tqdm(total=len(engine.ladder), desc="compiling", unit="bucket") as bar:

            def show(one: Compiled) -> None:
                bar.set_postfix_str(str(one.bucket), refresh=False)
                bar.update()

            report = warm(engine, workers=options.workers, progress=show)
        if model.checkpoint.special_tokens:
            # As `Tokenizer` asks for it; what transformers makes is in the cache now.
            read_tokenizer(model.checkpoint.folder)
    except (JaxembedError, ValueError) as error:
        print(f"warm-up failed: {error}", file=sys.stderr)
        return 1
    for one in report.compiled:
        print(f"{one.bucket!s:>10}  {one.seconds:7.2f} s  {'from the cache' if one.cached else 'compiled'}")
    print(f"{len(report.compiled)} buckets in {report.seconds:.2f} s, {report.cache_hits} from the cache")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
