"""Run every comparison with an original and write what it measured into README.md and docs/numerics.md: `make parity`.

1. The tests of `jaxembed/models` and of MiniLM run, in this process; each records what it measured.
2. The records become tables: one row for each file in `jaxembed/models`, whether it was compared or not.
3. The tables replace what stands between the markers. Nothing is written unless every test passed.

It stands beside `parity.py`, since what it reads are the tests' own records; nothing else knows of it.
"""

import importlib
import os
import pkgutil
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import pytest

__all__ = ["Figures", "Measured", "compact", "detailed", "replace", "row"]

ROOT = Path(__file__).resolve().parents[1]
MODELS, MINILM = ROOT / "tests/jaxembed/models", ROOT / "tests/jaxembed/test_minilm.py"
BEGIN, END = "<!-- parity:begin -->", "<!-- parity:end -->"

Record = Mapping[str, str]
"""What one test recorded: name -> value."""


class Figures:
    """A pytest plugin that keeps what tests record, by file and test."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str, Record]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest after each step of each test."""
        if report.when == "call" and report.passed:
            file, _, name = report.location
            properties = {key: str(value) for key, value in report.user_properties}
            self.records.append((Path(file).stem.removeprefix("test_"), name, properties))


@dataclass
class Measured:
    """One file of `jaxembed/models`.

    Attributes:
        file: its name, without ".py".
        lines: how many it has.
        model_types: names in config.json that lead to it.
        remote: classes of remote code that it replaces.
        references: what it was compared with.
        configurations: how many times.
        worst: the largest difference of any of them.
    """

    file: str
    lines: int
    model_types: Sequence[str]
    remote: Sequence[str]
    references: set[str] = field(default_factory=set)
    configurations: int = 0
    worst: float = 0.0


def architectures() -> list[Measured]:
    """The registry by file; nothing is measured yet."""
    # Not before the tests ran: they install their run-time checks first.
    models = importlib.import_module("jaxembed.models")
    found = []
    for info in pkgutil.iter_modules(models.__path__):
        module = importlib.import_module(f"jaxembed.models.{info.name}")
        own = [id(value) for value in vars(module).values()]
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        model_types, remote = (
            sorted(name for name, architecture in table.items() if id(architecture) in own)
            for table in (models.REGISTRY, models.REMOTE)
        )
        found.append(Measured(info.name, len(source.splitlines()), model_types, remote))
    return found


def measure(found: Sequence[Measured], records: Sequence[tuple[str, str, Record]]) -> None:
    """Put what the tests recorded to the file that each of them is named after.

    Raises:
        SystemExit: a comparison belongs to no file.
    """
    files = {one.file: one for one in found}
    for file, name, record in records:
        if "reference" not in record:
            continue
        if file not in files:
            raise SystemExit(f"test_{file}.py: {name} was compared, but there is no jaxembed/models/{file}.py")
        one = files[file]
        one.references.add(record["reference"])
        one.configurations += 1
        one.worst = max(one.worst, float(record["max abs diff"]))


def short(figure: float | str) -> str:
    """2.3e-06 as 2.3e-6."""
    return re.sub(r"e([-+])0*(\d)", r"e\1\2", f"{float(figure):.1e}")


def row(*cells: object) -> str:
    """A line of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def kinds(one: Measured) -> str:
    """The names that lead to an architecture."""
    known, remote = (", ".join(f"`{name}`" for name in names) for names in (one.model_types, one.remote))
    return "; ".join(part for part in (known, f"remote code {remote}" if remote else "") if part)


def originals(one: Measured) -> str:
    """What an architecture was compared with; what transformers does not have stands in the tests."""
    transformers = importlib.import_module("transformers")
    names = []
    for reference in sorted(one.references):
        name, _, rest = reference.partition(" ")
        where = "" if hasattr(transformers, name) or rest == "of sentence-transformers" else "(in the tests)"
        names.append(" ".join(part for part in (f"`{name}`", rest, where) if part))
    return ", ".join(names) or "nothing yet"


def minilm(records: Sequence[tuple[str, str, Record]]) -> list[tuple[str, str, str]]:
    """(model, compared with, result) of the real model, in float32 and in bfloat16."""
    by_test = {name: record for file, name, record in records if file == "minilm"}
    full = by_test["test_every_text_agrees_with_sentence_transformers"]
    half = by_test["test_bfloat16"]
    release = ".".join(version("sentence-transformers").split(".")[:2])
    return [
        (
            "all-MiniLM-L6-v2",
            f"sentence-transformers {release} on torch, {full['texts']} texts",
            f"{short(full['max abs diff'])}; least cosine 1 - {short(full['1 - min cosine'])}",
        ),
        ("the same, `--dtype bfloat16`", "itself in float32", f"least cosine {half['min cosine']}"),
    ]


def detailed(found: Sequence[Measured], real: Sequence[tuple[str, str, str]]) -> str:
    """The tables of docs/numerics.md."""
    releases = ", ".join(f"{name} {version(name).split('+')[0]}" for name in ("jax", "transformers", "torch"))
    lines = [
        f"Written by `make parity`, on CPU with {releases}. Weights are random; the difference",
        "is the largest absolute one of any hidden state or pooled vector, at every real token, of all configurations.",
        "",
        row("model_type", "file", "lines", "compared with", "configurations", "largest difference"),
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        worst = short(one.worst) if one.configurations else "-"
        lines.append(row(kinds(one), f"`{one.file}.py`", one.lines, originals(one), one.configurations, worst))
    lines += [
        "",
        row("model", "compared with", "largest difference"),
        "|---|---|---|",
        *(row(*cells) for cells in real),
    ]
    return "\n".join(lines)


def compact(found: Sequence[Measured], real: Sequence[tuple[str, str, str]]) -> str:
    """The table of README.md."""
    lines = [row("model", "compared with", "largest difference"), "|---|---|---|", *(row(*cells) for cells in real)]
    for one in found:
        lines.append(row(kinds(one), originals(one), short(one.worst) if one.configurations else "-"))
    return "\n".join(lines)


def replace(text: str, block: str) -> str:
    """A document with `block` between its markers.

    Raises:
        ValueError: there is not one pair of markers.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"not one {BEGIN} and one {END} behind it")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main() -> None:
    figures = Figures()
    os.environ["JAXEMBED_TEST_OPTIMISED"] = "1"
    status = pytest.main([str(MODELS), str(MINILM)], plugins=[figures])
    if status != pytest.ExitCode.OK:
        raise SystemExit(status)
    found = architectures()
    measure(found, figures.records)
    real = minilm(figures.records)
    for path, block in ((ROOT / "docs/numerics.md", detailed), (ROOT / "README.md", compact)):
        text = path.read_text(encoding="utf-8")
        path.write_text(replace(text, block(found, real)), encoding="utf-8")
        sys.stdout.write(f"written: {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
