"""Reading config.json into an architecture's Config. Knows no JAX."""

from collections.abc import Mapping
from typing import Any, TypeVar

from jaxembed.errors import UnsupportedModelError

__all__ = ["check_heads", "read_fields"]

Config = TypeVar("Config")


def read_fields(kind: type[Config], config: Mapping[str, Any], **given: Any) -> Config:
    """A Config from the fields of the same names in config.json.

    Args:
        kind: a dataclass whose fields have Hugging Face's names.
        config: config.json.
        given: fields that are known otherwise; they win.

    Raises:
        UnsupportedModelError: a field without a default is missing.
    """
    # mypy has no type for "a dataclass" that a type variable could be bound to.
    names: Mapping[str, Any] = kind.__dataclass_fields__  # type: ignore[attr-defined]
    try:
        return kind(**{name: config[name] for name in names if name in config} | given)
    except TypeError as error:
        raise UnsupportedModelError(f"config.json is no configuration of this kind of model: {error}") from None


def check_heads(hidden_size: int, num_attention_heads: int, num_key_value_heads: int | None = None) -> None:
    """Widths must divide into heads, and heads into groups.

    Raises:
        UnsupportedModelError: they do not.
    """
    if hidden_size % num_attention_heads:
        raise UnsupportedModelError(f"hidden_size {hidden_size} does not divide into {num_attention_heads} heads")
    if num_key_value_heads is not None and num_attention_heads % num_key_value_heads:
        raise UnsupportedModelError(
            f"{num_attention_heads} heads do not divide into num_key_value_heads {num_key_value_heads}"
        )
