"""What both benchmarks print alike: the machine, versions, tables, medians with their spread."""

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

__all__ = ["header", "publish", "ratios", "spread", "table"]


def header(title: str, packages: Iterable[str], device: str) -> str:
    """The head of a result: date, command, machine, versions.

    Args:
        title: heading.
        packages: distributions whose versions count.
        device: what the vectors were computed on.
    """
    # The file's own folders are nobody's business.
    command = " ".join([f"python -m bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    lines = [
        f"# {title}, {date.today().isoformat()}",
        "",
        f"- Command: `{command}`",
        f"- Device: {device}; CPU: {processor()}, {os.cpu_count()} cores",
        f"- Python {platform.python_version()}, " + ", ".join(f"{name} {installed(name)}" for name in packages),
        "- Machines are noisy: only the ratios of interleaved runs count (bench/README.md).",
    ]
    return "\n".join(lines)


def installed(package: str) -> str:
    """The version of a package, or "absent"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def processor() -> str:
    """The name of the CPU, as far as the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, the first column to the left and numbers to the right."""
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median (least-largest)."""
    low, middle, high = np.percentile(values, (0, 50, 100))
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def ratios(ours: Sequence[float], peer: Sequence[float]) -> str:
    """Median (least-largest) of the quotients repeat by repeat: what was measured together is divided."""
    return spread([a / b for a, b in zip(ours, peer, strict=True)], 2)


def publish(text: str, out: Path | None) -> None:
    """Print a result, or write it to a file."""
    if out is None:
        print(text)
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text + "\n")
    print(f"written to {out}")
