"""The public surface, and what importing it must not bring along."""

import importlib
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from types import ModuleType

import pytest

import jaxembed


def test_all_is_exactly_the_public_names() -> None:
    """Nothing public is left out of `__all__`, and nothing in it is missing."""
    public = {
        name
        for name, value in vars(jaxembed).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and value is not version
    }
    assert set(jaxembed.__all__) == public | {"__version__"}
    assert set(jaxembed.__all__) == {"Bucket", "Embedder", "JaxembedError", "Ladder", "__version__", "make_mesh"}


def test_the_version_is_the_distribution_s() -> None:
    """One place says it."""
    assert jaxembed.__version__ == version("jaxembed")


MODULES = [module.name for module in pkgutil.walk_packages(jaxembed.__path__, "jaxembed.")]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_offers(name: str) -> None:
    """A docstring, and an `__all__` without repetitions whose names exist."""
    module = importlib.import_module(name)
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    assert [offered for offered in module.__all__ if not hasattr(module, offered)] == []


def run(code: str) -> str:
    """Standard output of a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_brings_neither_torch_nor_transformers() -> None:
    """They cost seconds; torch is no dependency at all. Nor is a device touched."""
    code = """
import sys, jaxembed
heavy = {"torch", "transformers", "sentence_transformers", "huggingface_hub", "tokenizers", "jaxembed_server", "quart"}
print(sorted(heavy & set(sys.modules)))
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert run(code).split() == ["[]", "False"]


def test_encoding_works_without_torch() -> None:
    """With torch made impossible to import, a real model loads and encodes."""
    code = """
import sys
sys.modules["torch"] = None
from jaxembed import Bucket, Embedder, Ladder
model = Embedder.from_pretrained("sentence-transformers/all-MiniLM-L6-v2", ladder=Ladder([Bucket(1, 16)]))
print(model.encode("hello").shape)
"""
    assert run(code).strip() == "(384,)"
