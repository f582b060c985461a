"""Compiled executables kept in the cache: the next start loads them, and neither traces nor compiles the model again.

JAX's own persistent cache saves the compilation alone: the key of an entry is the program, which must be traced first.
Ours is what the program is made from: the checkpoint's configuration, the shapes, the code of this package, its
dependencies' versions, and the machine.
"""

import logging
import os
import pickle
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

from jaxembed.cache import Cache
from jaxembed.cpu_library import host_cpu
from jaxembed.kernel_choice import cpu_tokens_on
from jaxembed.model import Model
from jaxembed.types import Bucket, Output

__all__ = ["Kept", "facts", "has", "load_or_compile"]

logger = logging.getLogger(__name__)

KIND = "executables"

Kept = tuple[Any, bool]
"""An executable, and whether it came from the cache."""


def load_or_compile(
    cache: Cache | None, model: Model, output: Output, bucket: Bucket, compile: Callable[[], Any]
) -> Kept:
    """The executable of one shape: kept from an earlier time, or compiled now and kept.

    Args:
        cache: where executables are kept; None for nowhere.
        model, output, bucket: what is computed, and of what.
        compile: makes the executable.

    Raises:
        Exception: whatever `compile` raises.
    """
    if cache is None:
        return compile(), False
    key = cache.key(*facts(model, output), bucket)
    kept = cache.read(KIND, key)
    if kept is not None:
        try:
            program, in_tree, out_tree = pickle.loads(kept)
            devices = list(model.mesh.devices.flat)
            return deserialize_and_load(program, in_tree, out_tree, execution_devices=devices), True
        except Exception:  # Whatever a backend raises about bytes that it does not take: then it is compiled.
            logger.warning("an executable of %s in the cache cannot be loaded; it is compiled again", bucket)
    executable = compile()
    try:
        content = pickle.dumps(serialize(executable))
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        logger.debug("executables of this platform cannot be kept: %s", error)
    else:
        cache.write(KIND, key, content)
    return executable, False


def has(cache: Cache | None, model: Model, output: Output, bucket: Bucket) -> bool:
    """Whether the executable of a shape is in the cache."""
    return cache is not None and cache.has(KIND, cache.key(*facts(model, output), bucket))


def facts(model: Model, output: Output) -> tuple[Any, ...]:
    """All that the executables of a model depend on, but for the shape, the code and the versions."""
    checkpoint = model.checkpoint
    leaves = zip(model.paths, model.leaves, strict=True)
    specs = [(path, leaf.shape, str(leaf.dtype), str(leaf.sharding)) for path, leaf in leaves]
    said = (checkpoint.config, checkpoint.modules, checkpoint.normalize, checkpoint.head, checkpoint.late)
    return (said, model.dtype, model.head, model.tasks, model.left_out, specs, output, target(model.mesh, model.dtype))


def target(mesh: Mesh, dtype: str) -> tuple[Any, ...]:
    """What is compiled for."""
    devices = list(mesh.devices.flat)
    first = devices[0]
    host = host_cpu() if first.platform == "cpu" else ""
    named = ("jax_enable_x64", "jax_default_matmul_precision")
    settings = [*(getattr(jax.config, name) for name in named), os.environ.get("XLA_FLAGS")]
    return (
        first.platform,
        first.device_kind,
        first.client.platform_version,
        dict(mesh.shape),
        [device.id for device in devices],
        host,
        # Executables call those kernels; that they are loaded is a part of the answer.
        cpu_tokens_on(mesh, dtype),
        settings,
    )
