"""The registry: Hugging Face's model_type -> Architecture. One line each."""

from collections.abc import Mapping
from types import MappingProxyType

from jaxembed.errors import UnsupportedModelError
from jaxembed.models import bert
from jaxembed.types import Architecture

__all__ = ["REGISTRY", "architecture"]

REGISTRY: Mapping[str, Architecture] = MappingProxyType(
    {
        "bert": bert.ARCHITECTURE,
    }
)


def architecture(model_type: object) -> Architecture:
    """The architecture of a config.json's `model_type`.

    Raises:
        UnsupportedModelError: not in the registry.
    """
    found = REGISTRY.get(model_type) if isinstance(model_type, str) else None
    if found is None:
        raise UnsupportedModelError(
            f"config.json says model_type {model_type!r}; supported: {', '.join(sorted(REGISTRY))}"
        )
    return found
