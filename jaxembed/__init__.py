"""Text embeddings on JAX: `Embedder.from_pretrained(...).encode(...)`. Importing this loads no model and no torch."""

import importlib
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

# XLA's CPU backend logs an error for every executable that comes from the persistent cache: it takes two tuning flags
# of its own for features this machine lacks. What really fails raises. Set to 1 to see XLA's log.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

if TYPE_CHECKING:
    from jaxembed.buckets import Ladder
    from jaxembed.embedder import Embedder
    from jaxembed.errors import JaxembedError
    from jaxembed.sharding import make_mesh
    from jaxembed.types import Bucket

__all__ = ["Bucket", "Embedder", "JaxembedError", "Ladder", "__version__", "make_mesh"]

__version__ = version("jaxembed")

PLACES = {
    "Bucket": "jaxembed.types",
    "Embedder": "jaxembed.embedder",
    "JaxembedError": "jaxembed.errors",
    "Ladder": "jaxembed.buckets",
    "make_mesh": "jaxembed.sharding",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: what only tokenises does not import JAX."""
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)
