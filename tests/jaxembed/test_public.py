"""The public surface, and what importing it must not bring along."""

import importlib
import pkgutil
import subprocess
import sys
from importlib.metadata import version

import pytest

import jaxembed


def test_all_is_exactly_the_public_names() -> None:
    """Nothing in it is missing, and each is the one of the file that defines it."""
    assert set(jaxembed.__all__) == {"Bucket", "Embedder", "JaxembedError", "Ladder", "__version__", "make_mesh"}
    assert set(jaxembed.__all__) <= set(dir(jaxembed))
    for name in set(jaxembed.__all__) - {"__version__"}:
        value = getattr(jaxembed, name)
        assert getattr(importlib.import_module(value.__module__), name) is value
    with pytest.raises(AttributeError, match="module 'jaxembed' has no attribute 'Encoder'"):
        _ = jaxembed.Encoder


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


HOST_SIDE = (
    "buckets, cache, checkpoint, colbert, configs, errors, inputs, matryoshka, modules, pairs, refinement, routes, "
    "settings, similarity, tensors, tokenizer, tokenizer_files, types"
)


def test_the_host_side_can_be_had_without_jax() -> None:
    """A process that only tokenises must not pay for what it does not use."""
    code = f"""
import sys
from jaxembed import {HOST_SIDE}
print(sorted({{"jax", "flax", "scipy.optimize", "scipy.sparse", "transformers", "tokenizers"}} & set(sys.modules)))
"""
    assert run(code).strip() == "[]"


def test_importing_brings_neither_torch_nor_transformers() -> None:
    """They cost seconds; torch is no dependency at all. Nor is a device touched, nor SciPy before it is needed."""
    code = """
import sys, jaxembed.embedder
heavy = {"torch", "transformers", "sentence_transformers", "huggingface_hub", "tokenizers", "jaxembed_server", "quart",
         "scipy.optimize", "scipy.sparse", "jax.experimental.pallas"}
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
