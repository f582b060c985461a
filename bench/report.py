"""What both benchmarks print alike: the machine, versions, tables, medians with their spread."""

import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

import numpy as np

__all__ = ["header", "publish", "ratios", "spread", "table"]


def header(title: str) -> str:
    """The head of a result: date, command, machine."""
    # Folders of this machine are nobody's business, neither the script's own nor that of the result.
    given = [Path(one).name if Path(one).is_absolute() else one for one in sys.argv[1:]]
    command = " ".join([f"python -m bench.{Path(sys.argv[0]).stem}", *given])
    lines = [
        f"# {title}, {date.today().isoformat()}",
        "",
        f"- Command: `{command}`",
        f"- CPU: {processor()}, {os.cpu_count()} cores; {instructions()}",
        f"- Python {platform.python_version()}",
        "- Machines are noisy: only the ratios of interleaved runs count (bench/README.md).",
    ]
    return "\n".join(lines)


def processor() -> str:
    """The name of the CPU, as far as the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def instructions() -> str:
    """Which of the instructions that matter for speed the CPU has, as far as the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return ", ".join(name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags) or "unknown"


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
