"""The warm-up: every bucket, every failure by name, the cache, and the command line."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import pytest
from parity import save_checkpoint, tiny_bert

from jaxembed import Bucket, Ladder, make_mesh, warmup
from jaxembed.engine import Compiled, Engine
from jaxembed.errors import CompileError, WrongNumbersError
from jaxembed.executables import KIND
from jaxembed.loading import load
from jaxembed.model import Model
from jaxembed.warmup import cache_folder, main, use_cache, warm

LADDER = Ladder([Bucket(1, 8), Bucket(2, 8), Bucket(1, 16)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of one layer on one device: what is compiled here does not matter, only that it is."""
    folder = save_checkpoint(tiny_bert(num_hidden_layers=1), tmp_path_factory.mktemp("one-layer"))
    return load(folder, mesh=make_mesh(jax.devices()[:1]))


def entries(folder: Path) -> int:
    """Executables in a cache folder."""
    return len(list((folder / KIND).iterdir()))


class Failing(Engine):
    """An engine that cannot compile two of its buckets."""

    def compile(self, bucket: Bucket) -> Compiled:
        if bucket.batch_size == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nsecond line")
        if bucket.seq_len == 16:
            raise ValueError
        return super().compile(bucket)


def test_every_bucket_is_ready_and_reported(model: Model) -> None:
    """In the ladder's order, with progress after each."""
    engine = Engine(model, LADDER)
    seen: list[Compiled] = []
    report = warm(engine, workers=2, progress=seen.append)
    assert engine.compiled == set(LADDER.buckets)
    assert tuple(one.bucket for one in report.compiled) == LADDER.buckets
    assert sorted(one.bucket for one in seen) == sorted(LADDER.buckets)
    assert report.seconds > 0
    assert all(one.seconds > 0 for one in report.compiled)


def test_every_failing_bucket_is_named(model: Model) -> None:
    """The first line of each cause; the other buckets are ready all the same, and were reported."""
    engine = Failing(model, LADDER)
    seen: list[Compiled] = []
    with pytest.raises(CompileError) as caught:
        warm(engine, progress=seen.append)
    assert caught.value.failures == {
        "2x8": "RuntimeError: RESOURCE_EXHAUSTED: out of memory",
        "1x16": "ValueError: ",
    }
    assert engine.compiled == {Bucket(1, 8)}
    assert [one.bucket for one in seen] == [Bucket(1, 8)]


def test_wrong_numbers_stop_the_warm_up(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is compiled."""

    def wrong() -> None:
        raise WrongNumbersError("this jaxlib miscomputes")

    monkeypatch.setattr(warmup, "check_numerics", wrong)
    engine = Engine(model, LADDER)
    with pytest.raises(WrongNumbersError):
        warm(engine)
    assert engine.compiled == frozenset()


def test_the_second_engine_finds_everything_in_the_cache(model: Model, cache: Path) -> None:
    """Hits are counted, not assumed: none the first time, all of them the second."""
    first = warm(Engine(model, LADDER))
    assert first.cache_hits == 0
    assert not any(one.cached for one in first.compiled)
    assert entries(cache) == len(LADDER)
    second = warm(Engine(model, LADDER))
    assert second.cache_hits == len(LADDER)
    assert all(one.cached for one in second.compiled)


def test_hits_are_counted_bucket_by_bucket(model: Model, cache: Path) -> None:
    """Also when several threads compile at once and only some buckets are cached."""
    warm(Engine(model, Ladder([Bucket(1, 8), Bucket(1, 16)])))
    report = warm(Engine(model, LADDER), workers=3)
    assert {one.bucket: one.cached for one in report.compiled} == {
        Bucket(1, 8): True,
        Bucket(2, 8): False,
        Bucket(1, 16): True,
    }


def test_the_cache_can_be_moved_and_switched_off(model: Model, cache: Path, tmp_path: Path) -> None:
    """Also after something was compiled: JAX's own, which must be off, keeps to the folder it saw first."""
    warm(Engine(model, Ladder([Bucket(1, 8)])))
    assert entries(cache) == 1
    other = tmp_path / "other"
    use_cache(other)
    assert warm(Engine(model, Ladder([Bucket(1, 8)]))).cache_hits == 0
    assert entries(other) == 1
    use_cache(None)
    assert warm(Engine(model, Ladder([Bucket(1, 8)]))).cache_hits == 0
    assert entries(cache) == entries(other) == 1


def test_where_the_cache_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for each jaxlib, under the home unless told otherwise."""
    monkeypatch.setenv("HOME", str(tmp_path))
    leaf = f"jaxlib-{version('jaxlib')}"
    assert cache_folder() == tmp_path / ".cache" / "jaxembed" / leaf
    assert cache_folder(Path("~/elsewhere")) == tmp_path / "elsewhere" / leaf
    assert cache_folder(tmp_path) == tmp_path / leaf


def test_the_command_line(tiny_folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0, a line for each bucket; run again, everything comes from the cache."""
    arguments = ["--model", str(tiny_folder), "--cache-dir", str(cache), "--max-length", "9"]
    arguments += ["--max-batch-tokens", "18", "--workers", "2"]
    for source in ("compiled", "from the cache"):
        assert main(arguments) == 0
        shown = capsys.readouterr()
        first, *lines, last = shown.out.splitlines()
        assert first.startswith(f"{tiny_folder}, float32: 2 buckets on cpu; cache {cache_folder(cache)}")
        # Eight devices: batches of 8 and of 16 rows.
        assert [line.split()[0] for line in lines] == ["8x9", "16x9"]
        assert all(line.endswith(source) for line in lines)
        assert last.startswith("2 buckets in ")
        assert last.endswith(f"{0 if source == 'compiled' else 2} from the cache")
        assert "2/2" in shown.err
        kinds = [(kind.name, len(list(kind.iterdir()))) for kind in sorted(cache_folder(cache).iterdir())]
        assert kinds == [("executables", 2), ("tokenizers", 1)]


def test_the_command_line_names_what_failed(
    tiny_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, the bucket on standard error."""

    class Broken(Engine):
        def compile(self, bucket: Bucket) -> Compiled:
            raise RuntimeError("no such luck")

    monkeypatch.setattr(warmup, "Engine", Broken)
    arguments = ["--model", str(tiny_folder), "--cache-dir", str(cache), "--max-length", "9", "--max-batch-tokens", "9"]
    assert main(arguments) == 1
    assert "warm-up failed: bucket 8x9: RuntimeError: no such luck" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "./nowhere"], "cannot find the checkpoint './nowhere'"),
        (["--max-length", "33"], "max_length is 33; allowed: 1 to 32"),
        (["--max-length", "0"], "max_length is 0; allowed: 1 to 32"),
        (["--max-batch-tokens", "-5"], "each must be at least 1"),
        (["--max-batch-tokens", "0"], "each must be at least 1"),
    ],
)
def test_the_command_line_refuses(
    arguments: list[str], message: str, tiny_folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 and one sentence, no traceback."""
    assert main(["--model", str(tiny_folder), "--cache-dir", str(cache), *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("warm-up failed: ")
    assert message in shown.err
    assert shown.out == ""


def test_the_process_exits_with_1(tmp_path: Path) -> None:
    """`python -m jaxembed.warmup` hands the code to the shell."""
    command = [sys.executable, "-m", "jaxembed.warmup", "--model", "./nowhere", "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert "warm-up failed: cannot find the checkpoint './nowhere'" in done.stderr
    assert "Traceback" not in done.stderr
