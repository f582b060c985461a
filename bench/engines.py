"""The engines that are measured in process: what each is called, which module of `workers` runs it, and where.

A peer has an environment of its own, which `make bench-peers` builds; our own stands in for it where it has the same
packages. One that has neither is a line in the result.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.process import WORKERS, Worker, environment
from jaxembed.checkpoint import resolve

__all__ = [
    "ABSENT",
    "ENGINES",
    "ON_ACCELERATOR",
    "ON_CPU",
    "OURS",
    "REFERENCE",
    "Spec",
    "environment_of",
    "min_cosine",
    "start",
]

PEERS = Path(__file__).resolve().parent.parent / ".venv-peers"
ABSENT = "absent: run make bench-peers"


@dataclass(frozen=True)
class Spec:
    """One engine.

    Attributes:
        name: in the tables.
        module: of `workers`.
        options: of the module's `make`, beside the model.
        home: the peer's environment; None for ours.
        needs: modules by which our own environment can stand in for it.
    """

    name: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    home: str | None = None
    needs: tuple[str, ...] = ()


REFERENCE = "sentence-transformers fp32"
LARGE = 512
"""Texts a batch that a GPU is better used with than with sentence-transformers' own 32."""
OURS = ("jaxembed fp32", "jaxembed fp32 refined", "jaxembed bf16", "jaxembed bf16 refined")
ST, ONNX = "sentence-transformers", "sentence-transformers-onnx"

SPEC_OF_REFERENCE = Spec(
    REFERENCE, "engine_sentence_transformers", {"backend": "torch"}, ST, ("sentence_transformers", "torch")
)

SPECS = (
    *(
        Spec(name, "engine_jaxembed", {"dtype": dtype, "refined": "each" if "refined" in name else "no"})
        for name, dtype in zip(OURS, ("float32", "float32", "bfloat16", "bfloat16"), strict=True)
    ),
    SPEC_OF_REFERENCE,
    Spec("sentence-transformers ONNX fp32", "engine_sentence_transformers", {"backend": "onnx"}, ONNX),
    Spec("sentence-transformers OpenVINO fp32", "engine_sentence_transformers", {"backend": "openvino"}, ST),
    Spec("onnxruntime fp32", "engine_onnxruntime", {}, "loops", ("onnxruntime", "tokenizers")),
    Spec("OpenVINO fp32, 2 streams", "engine_openvino", {"precision": "f32"}, "loops", ("openvino", "tokenizers")),
    Spec("OpenVINO bf16, 2 streams", "engine_openvino", {"precision": "bf16"}, "loops", ("openvino", "tokenizers")),
)
ACCELERATED = (
    *(spec for spec in SPECS if spec.name in (*OURS, REFERENCE)),
    *(
        replace(SPEC_OF_REFERENCE, name=f"{ST} {name}, batches of {LARGE}", options=options)
        for name, options in (
            ("fp32", {"backend": "torch", "batch": LARGE}),
            ("bf16", {"backend": "torch", "batch": LARGE, "dtype": "bfloat16"}),
        )
    ),
)
"""Those for an accelerator."""

ON_CPU, ON_ACCELERATOR = ({spec.name: spec for spec in specs} for specs in (SPECS, ACCELERATED))
ENGINES: Mapping[str, Spec] = ON_CPU | ON_ACCELERATOR
"""Name in the tables -> engine. Ours come first."""


def environment_of(home: str | None, needs: tuple[str, ...] = (), *, peers: bool = True) -> str | None:
    """The Python that runs a peer; None if it is not installed.

    Args:
        home: name of its environment; None for our own.
        needs: modules by which our own can stand in; none: it cannot.
        peers: whether environments beside our own may be used.
    """
    if home is None:
        return sys.executable
    # Written once everything is in: a broken build is no environment.
    if peers and (PEERS / home / ".ready").is_file():
        return str(PEERS / home / "bin" / "python")
    return sys.executable if needs and all(importlib.util.find_spec(name) for name in needs) else None


def start(spec: Spec, model: str, folder: Path, *, device: str | None = "cpu", peers: bool = True) -> Worker | str:
    """An engine that gave its first vector, or why there is none; ours must work, so its errors are raised.

    Args:
        spec: which.
        model: folder or hub id.
        folder: where exported models are kept for the run.
        device: of torch; None lets it choose.
        peers: whether environments beside our own may be used.
    """
    python = environment_of(spec.home, spec.needs, peers=peers)
    if python is None:
        return ABSENT
    foreign = python != sys.executable
    options = dict(spec.options)
    try:
        options["model"] = str(resolve(model))
        if spec.module in ("engine_onnxruntime", "engine_openvino"):
            options["onnx"] = str(onnx(options["model"], folder))
        elif spec.module == "engine_sentence_transformers":
            options["device"] = device
            if options["backend"] != "torch":
                saved = folder / options["backend"]
                script(python, "engine_sentence_transformers.py", options["model"], options["backend"], str(saved))
                options["model"] = str(saved)
        return Worker(python, spec.module, options, foreign=foreign)
    except RuntimeError as error:
        if spec.name in OURS:
            raise
        return f"absent: {error}"


def onnx(model: str, folder: Path) -> Path:
    """The file of the plain loops, written by whichever environment has what that takes.

    Raises:
        RuntimeError: none has, or the model is of another kind.
    """
    file = folder / "model.onnx"
    if not file.is_file():
        ours = environment_of("", ("torch", "onnx", "transformers"))
        python = ours or environment_of(ST)
        if python is None:
            raise RuntimeError("no environment has torch and onnx to export the model with; run make bench-peers")
        script(python, "export.py", model, str(file))
    return file


def script(python: str, name: str, *arguments: str) -> None:
    """Run a program of `workers` to its end.

    Raises:
        RuntimeError: it failed; the message is the last line that it wrote.
    """
    line = [python, str(WORKERS / name), *arguments]
    done = subprocess.run(line, env=environment(foreign=python != sys.executable), capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.decode(errors="replace").strip().splitlines() or ["it failed in silence"])[-1])


def min_cosine(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> float:
    """The least cosine between rows of the same index, in float64."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    return float(((x * y).sum(axis=1) / (np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1))).min())
