"""Which kernels are used on a CPU: only ones that were built, are right, and pay; and that is found out once."""

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxembed import cpu_kernels, cpu_library, kernel_choice, make_mesh
from jaxembed.cpu_library import build, compiler
from jaxembed.kernel_choice import kernels_on
from jaxembed.warmup import use_cache

TOKENS = max(kernel_choice.TIMED)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Compilers and libraries that are none, kernels that are right and pay; what was done, in order."""
    done: list[str] = []

    def note(what: str, result: Any) -> Callable[..., Any]:
        def call(*_: Any) -> Any:
            done.append(what)
            return result

        return call

    monkeypatch.setattr(cpu_library, "compiler", lambda _: Path(__file__))
    monkeypatch.setattr(cpu_library, "build", note("build", b"library"))
    monkeypatch.setattr(cpu_library, "load", note("load", None))
    monkeypatch.setattr(cpu_library, "in_pairs", lambda _: False)
    monkeypatch.setattr(kernel_choice, "right", note("try", True))
    monkeypatch.setattr(kernel_choice, "worth", note("time", TOKENS))
    return done


def tokens(devices: int = 1, dtype: str = "float32") -> int:
    return kernels_on(make_mesh(jax.devices()[:devices]), dtype).cpu_tokens


def test_it_is_found_out_once(built: list[str], cache: Path) -> None:
    """The next process finds the library and what was found out in the cache."""
    assert tokens() == tokens() == TOKENS
    assert built == ["build", "load", "try", "time"]
    built.clear()
    use_cache(cache)
    assert tokens() == TOKENS
    assert built == ["load"]


def test_several_devices(built: list[str], cache: Path) -> None:
    """They are not made for that."""
    assert tokens(devices=2) == 0
    assert not built


def test_each_dtype_for_itself(built: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the one that is asked for is tried and timed; what was found out of each is kept."""

    def right(dtype: str) -> bool:
        built.append(dtype)
        return dtype == "bfloat16"

    monkeypatch.setattr(kernel_choice, "right", right)
    monkeypatch.setattr(kernel_choice, "worth", {"float32": 16, "bfloat16": 64}.get)
    monkeypatch.setattr(cpu_library, "in_pairs", lambda _: True)
    assert tokens(dtype="bfloat16") == 64
    assert built == ["build", "load", "bfloat16"]
    assert tokens() == 0
    assert built[3:] == ["build", "load", "float32"]
    built.clear()
    use_cache(cache)
    assert (tokens(), tokens(dtype="bfloat16")) == (0, 64)
    assert built == ["load"]


@pytest.mark.parametrize(("rounded", "worth", "used"), [(False, 128, 0), (False, TOKENS, TOKENS), (True, 128, 128)])
def test_all_batches_or_none_where_operands_are_rounded_otherwise(
    rounded: bool, worth: int, used: int, built: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, where inputs are not rounded, a text has one vector in all batches; in float32 any number does."""
    monkeypatch.setattr(cpu_library, "in_pairs", lambda _: rounded)
    monkeypatch.setattr(kernel_choice, "worth", lambda _: worth)
    assert tokens(dtype="bfloat16") == used
    assert tokens() == worth


def test_nothing_is_built_without_a_cache(built: list[str]) -> None:
    use_cache(None)
    assert tokens() == 0
    assert not built


def test_without_a_compiler(built: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_library, "compiler", lambda _: None)
    assert tokens() == 0
    assert not built


def test_a_compiler_that_cannot_is_asked_once(built: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(cpu_library, "build", asked.append)
    for _ in range(2):
        use_cache(cache)
        assert tokens() == 0
    assert len(asked) == 1
    assert not built


def test_wrong_ones_are_not_used(built: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor timed, nor tried again."""
    monkeypatch.setattr(kernel_choice, "right", lambda _: False)
    for _ in range(2):
        use_cache(cache)
        assert tokens() == 0
    assert built == ["build", "load"]


def test_a_library_that_cannot_be_loaded(
    built: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning; everything is XLA's."""

    def load(_: bytes) -> None:
        raise OSError("no such instruction")

    monkeypatch.setattr(cpu_library, "load", load)
    with caplog.at_level(logging.WARNING):
        assert tokens() == 0
    assert "cannot be loaded, XLA's are used: no such instruction" in caplog.text


@pytest.mark.parametrize(
    "wrong", ["products", "linear_norm", "feed_forward", "gated_feed_forward", "attention", "embed", "totals"]
)
@pytest.mark.usefixtures("library")
def test_right_looks_at_all(wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A hundredth too much, or NaN, in any is seen."""
    assert kernel_choice.right("float32")
    true = getattr(cpu_kernels, wrong)
    for factor in (1.01, jnp.nan):
        monkeypatch.setattr(cpu_kernels, wrong, lambda *a, f=factor, **b: jax.tree.map(lambda y: y * f, true(*a, **b)))
        assert not kernel_choice.right("float32")
        assert "and are not used" in caplog.messages[-1]


@pytest.mark.parametrize(
    ("ratios", "best"),
    [
        ([0.7, 0.7, 0.9], 512),
        ([1.2, 1.3, 0.7, 1.2, 0.8, 1.1, 1.2, 1.05], 512),
        ([0.7, 0.7, 1.2, 1.2, 1.1], 128),
        ([1.06, 1.06, 1.06], 0),
    ],
)
@pytest.mark.usefixtures("library")
def test_refused_only_if_slower_again_and_again(
    ratios: list[float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In three tries of a number of tokens; larger ones are not asked for then."""
    left = iter(ratios)
    monkeypatch.setattr(kernel_choice, "compared", lambda *_: next(left))
    assert kernel_choice.worth("float32") == best
    assert next(left, None) is None


def test_two_are_compared_in_turns() -> None:
    """By the median of the rounds: a round that was held up says nothing."""
    now = itertools.count()
    slept = []

    def taking(seconds: float, held_up: float) -> Callable[..., None]:
        def call(*_: Any) -> None:
            slept.append(held_up if next(now) % 10 < 2 else seconds)

        return call

    clock = iter(lambda: sum(slept), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_choice.time, "perf_counter", lambda: next(clock))
        assert kernel_choice.compared([taking(1.0, 50.0), taking(2.0, 2.0)], None, []) == 0.5
    assert len(slept) == 2 * kernel_choice.ROUNDS


@pytest.mark.parametrize(
    ("source", "said"),
    [("#error this is no C++", "cannot compile the kernels for CPU, XLA's are used"), (None, "cannot be run")],
)
def test_a_compiler_that_fails(
    source: str | None,
    said: str,
    cxx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What it says first is in the log; the library is None."""
    (tmp_path / "kernels.cpp").write_text(source or "")
    monkeypatch.setattr(cpu_library, "SOURCE", tmp_path / "kernels.cpp")
    assert build(cxx if source else tmp_path / "c++") is None
    assert said in caplog.text


@pytest.mark.parametrize(
    ("dtype", "machine", "flags", "there"),
    [
        ("float32", "x86_64", "flags : sse avx2 fma", True),
        ("float32", "x86_64", "flags : sse avx2x fma", False),
        ("float32", "aarch64", "avx2 fma", False),
        ("bfloat16", "x86_64", "flags : sse avx2 fma", True),
        ("bfloat16", "x86_64", "flags : sse avx", False),
        ("float16", "x86_64", "flags : sse avx2 fma", False),
    ],
)
def test_for_which_machines_there_is_a_compiler(
    dtype: str, machine: str, flags: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$CXX is asked before `c++`."""
    program = tmp_path / "mine"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setattr(cpu_library.platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu_library, "host_cpu", lambda: flags)
    assert compiler(dtype) == (program.resolve() if there else None)
