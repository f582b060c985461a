"""Executables for a TPU that is not there: what XLA says that they move and hold. `python -m bench.tpu`; see README.md.

libtpu compiles for a topology by name, on any machine. Nothing runs, so nothing here is a time that was measured.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from bench.report import header, publish, table
from jaxembed.buckets import Ladder
from jaxembed.checkpoint import DEFAULT_MODEL
from jaxembed.engine import OTHER_BATCH_TOKENS
from jaxembed.kernels import Kernels
from jaxembed.loading import DTYPES, load
from jaxembed.model import Model
from jaxembed.program import lower
from jaxembed.sharding import make_mesh
from jaxembed.types import Bucket, Output

CHIPS = {"v5e": (819e9, 197e12), "v6e": (1640e9, 918e12)}
"""Bytes and operations in bfloat16 a second of a chip, as Google's documentation of Cloud TPU gives them."""

COLUMNS = (
    "shape",
    "attention",
    "GB moved",
    "TFLOP",
    "ms by memory",
    "ms by arithmetic",
    "temporary MB",
    "s to compile",
)

VARIABLES = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}
"""Without them libtpu asks the machine's metadata server which TPU there is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark as a program."""
    options = arguments(argv)
    os.environ.update(VARIABLES)
    jax.config.update("jax_platforms", "cpu")
    model = load(options.model, dtype=options.dtype, mesh=make_mesh(jax.devices()[:1]))
    devices = topologies.get_topology_desc(options.topology, platform="tpu").devices
    mesh = make_mesh(devices[: options.chips])
    whole = NamedSharding(mesh, PartitionSpec())
    leaves = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole) for leaf in model.leaves)
    model = replace(model, mesh=mesh, leaves=leaves)
    bandwidth, rate = chip = CHIPS[options.topology.split(":")[0]]
    rows = []
    for bucket in fullest(model.max_length, options.chips):
        for name, kernel in (("XLA's", False), ("one kernel", True)):
            rows.append([str(bucket), name, *compiled(model, bucket, Kernels(mesh, rows=kernel), chip)])
            print(*rows[-1], file=sys.stderr)
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "libtpu"))
    text = "\n\n".join(
        [
            header(f"Compiled for {options.topology}"),
            f"- {model.checkpoint.name}, {model.dtype}; {versions}",
            "Of one chip. **Nothing ran**: GB and TFLOP as XLA counts them, the kernel's as it states them; at least "
            f"so many ms by {bandwidth / 1e9:,.0f} GB and {rate / 1e12:,.0f} TFLOP a second.",
            table(COLUMNS, rows),
        ]
    )
    publish(text, options.out)
    return 0


def fullest(max_length: int, chips: int) -> list[Bucket]:
    """The shape of most rows, of each length of the default ladder."""
    ladder = Ladder.default(
        max_length=max_length, max_batch_tokens=OTHER_BATCH_TOKENS * chips, batch_multiple=chips, flat=False
    )
    largest = {bucket.seq_len: bucket for bucket in sorted(ladder.buckets, key=lambda bucket: bucket.batch_size)}
    return [largest[length] for length in sorted(largest)]


def compiled(model: Model, bucket: Bucket, kernels: Kernels, chip: tuple[float, float]) -> list[str]:
    """The columns of one executable."""
    start = time.perf_counter()
    # Pallas asks what it compiles for, which is not the device that there is.
    with jax.set_mesh(model.mesh):
        executable = lower(model, Output.DENSE, bucket, kernels).compile()
    seconds = time.perf_counter() - start
    counted = executable.cost_analysis()
    moved, operations = counted["bytes accessed"], counted["flops"]
    bandwidth, rate = chip
    return [
        f"{moved / 1e9:.2f}",
        f"{operations / 1e12:.3f}",
        f"{moved / bandwidth * 1e3:.2f}",
        f"{operations / rate * 1e3:.2f}",
        f"{executable.memory_analysis().temp_size_in_bytes / 1e6:,.0f}",
        f"{seconds:.0f}",
    ]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.tpu", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="folder or hub id (default: %(default)s)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES, help="(default: %(default)s)")
    parser.add_argument("--topology", default="v5e:2x4", help="v5e or v6e, and chips (default: %(default)s)")
    parser.add_argument("--chips", type=int, default=1, help="of it, that share a batch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=None, help="markdown file to write (default: print)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
