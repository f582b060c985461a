"""Text embeddings on JAX: `Embedder.from_pretrained(...).encode(...)`. Importing this loads no model and no torch."""

from importlib.metadata import version

from jaxembed.buckets import Ladder
from jaxembed.embedder import Embedder
from jaxembed.errors import JaxembedError
from jaxembed.sharding import make_mesh
from jaxembed.types import Bucket

__all__ = ["Bucket", "Embedder", "JaxembedError", "Ladder", "__version__", "make_mesh"]

__version__ = version("jaxembed")
