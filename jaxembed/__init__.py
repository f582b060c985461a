"""Text embeddings on JAX: `Embedder.from_pretrained(...).encode(...)`. Importing this loads no model and no torch.

The public names are imported when they are first used: `jaxembed.tokenizer` and the other host-side files can be had
without JAX, which takes longer to import than all of them.
"""

import importlib
import os
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxembed.buckets import Ladder
    from jaxembed.embedder import Embedder
    from jaxembed.errors import JaxembedError
    from jaxembed.sharding import make_mesh
    from jaxembed.types import Bucket

__all__ = ["Bucket", "Embedder", "JaxembedError", "Ladder", "__version__", "make_mesh"]

# XLA's CPU backend logs an error for every executable that it loads again: it takes two tuning flags of its own for
# features this machine lacks. What really fails raises. Set to 1 to see XLA's log.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

__version__ = version("jaxembed")

_WHERE = {
    "Bucket": "types",
    "Embedder": "embedder",
    "JaxembedError": "errors",
    "Ladder": "buckets",
    "make_mesh": "sharding",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
