"""What every test runs under: eight CPU devices, strict dtypes and ranks, run-time shape checks, no network.

`make test-gpu` asks for other devices by JAXEMBED_TEST_PLATFORMS. Knows only the library; the server's tests share it.
"""

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

# Read by huggingface_hub, which the library imports when it first needs it.
os.environ["HF_HUB_OFFLINE"] = "1"
# No C++ compiler but for the tests of what it compiles (`cxx`): each empty cache would take seconds to be filled.
os.environ["CXX"] = "none"
# The same operations in machine code that is not optimised, and so made in half the time. `make parity`, servers in
# processes and the real model in `test_minilm` have it as users do.
UNOPTIMISED = "--xla_backend_optimization_level=0"
if "JAXEMBED_TEST_OPTIMISED" not in os.environ and UNOPTIMISED not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {UNOPTIMISED}".strip()

# All of this must stand before the first array, and the hook before the first import of the library.
assert "jaxembed" not in sys.modules, "jaxembed was imported before its run-time shape checks were installed"
jax.config.update("jax_platforms", os.environ.get("JAXEMBED_TEST_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# What names shapes has them checked. The rest is mypy's, and some of it is called a hundred thousand times in a test.
(package,) = importlib.util.find_spec("jaxembed").submodule_search_locations
checked = [
    ".".join(file.relative_to(Path(package).parent).with_suffix("").parts)
    for file in sorted(Path(package).rglob("*.py"))
    if "jaxtyping" in file.read_text()
]
jaxtyping.install_import_hook(checked, "beartype.beartype")

from jaxembed import Bucket, Embedder, Ladder, cpu_library, make_mesh  # noqa: E402
from jaxembed.checkpoint import DEFAULT_MODEL, resolve  # noqa: E402
from jaxembed.warmup import use_cache  # noqa: E402

# Examples are the same on every run, and no test depends on how fast the machine is.
hypothesis.settings.register_profile("jaxembed", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("jaxembed")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """What was taken for lasting (`memory.settle`) is garbage after its test, like everything else."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def shared_compilations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One persistent compilation cache for the session: many tests compile the same small shapes."""
    folder = tmp_path_factory.mktemp("compilations")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


@pytest.fixture
def cache(tmp_path: Path, shared_compilations: Path) -> Iterator[Path]:
    """An empty cache; JAX's own, which the session uses and `use_cache` switches off, comes back afterwards."""
    folder = tmp_path / "cache"
    use_cache(folder)
    yield folder
    use_cache(None)
    jax.config.update("jax_compilation_cache_dir", str(shared_compilations))


@pytest.fixture
def cxx(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The machine's C++ compiler, which is there as it is outside of tests."""
    monkeypatch.delenv("CXX")
    program = cpu_library.compiler("float32")
    if program is None:
        pytest.skip("no C++ compiler, or a CPU without AVX2: nothing is built for it")
    return program


build_once = lru_cache(cpu_library.build)


@pytest.fixture
def library(cxx: Path) -> None:
    """The kernels for CPU are built and loaded, whatever trying and timing them would give."""
    built = build_once(cxx)
    assert built is not None
    cpu_library.load(built)


@pytest.fixture(scope="session")
def minilm_folder() -> Path:
    """The folder of the real all-MiniLM-L6-v2, carried by an installed package."""
    return resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def minilm(minilm_folder: Path) -> Embedder:
    """The real model on one device."""
    return Embedder.from_pretrained(minilm_folder, mesh=make_mesh(jax.devices()[:1]))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of two layers of width 16 with a tokenizer of single letters, 32 positions, no modules.json."""
    from parity import save_checkpoint, tiny_bert

    return save_checkpoint(tiny_bert(), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Embedder:
    """The tiny model on one device, with three buckets."""
    ladder = Ladder([Bucket(1, 32), Bucket(4, 8), Bucket(4, 32)])
    return Embedder.from_pretrained(tiny_folder, ladder=ladder, mesh=make_mesh(jax.devices()[:1]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests measured (`record_property`), so that they can be quoted."""
    reports = [report for report in terminalreporter.getreports("passed") if report.user_properties]
    if reports:
        terminalreporter.section("measured")
    for report in reports:
        figures = ", ".join(f"{name} {value}" for name, value in report.user_properties)
        terminalreporter.write_line(f"{report.nodeid.split('/')[-1]}: {figures}")
