"""Every setting of the server, cast once: from the command line, else from JAXEMBED_*, else the default.

Nothing else in the server reads the environment.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxembed.checkpoint import DEFAULT_MODEL
from jaxembed.matryoshka import Policy

__all__ = ["ENV_PREFIX", "ConfigError", "ServerConfig", "from_sources", "read"]

ENV_PREFIX = "JAXEMBED_"


class ConfigError(ValueError):
    """A setting has an impossible value. The message names the setting, the value and what is allowed."""


def integer(least: int) -> Callable[[str], int]:
    """A cast to an integer of at least `least`."""

    def cast(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ValueError(f"a whole number of at least {least}")
        return value

    return cast


def port(text: str) -> int:
    """A cast to a TCP port; 0 lets the system choose a free one."""
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise ValueError("a port from 0 to 65535")
    return int(text)


def seconds(text: str) -> float:
    """A cast to a positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise ValueError("a positive number of seconds")
    return value


def one_of(*allowed: str) -> Callable[[str], str]:
    """A cast that lets only these through."""

    def cast(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"one of {', '.join(allowed)}")
        return text

    return cast


def names(text: str) -> tuple[str, ...]:
    """A cast to names separated by commas."""
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise ValueError("one or more names, separated by commas")
    return found


def sizes(text: str) -> tuple[int, ...]:
    """A cast to vector sizes separated by commas; "any" for every size."""
    if text == "any":
        return ()
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise ValueError("'any', or sizes of at least 1 separated by commas, such as 256,128")
    return found


def flag(text: str) -> bool:
    """A cast to a truth value."""
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in values:
        raise ValueError("true or false")
    return values[text.lower()]


def setting(default: Any, cast: Callable[[str], Any], explain: str) -> Any:
    """A field of ServerConfig with its cast and its line of help."""
    return dataclasses.field(default=default, metadata={"cast": cast, "help": explain})


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """The settings. Each field is also a flag of `jaxembed serve` and a variable JAXEMBED_<NAME>."""

    model: str = setting(DEFAULT_MODEL, str, "folder or hub id of the model to serve")
    host: str = setting("127.0.0.1", str, "address to listen on; 0.0.0.0 for every interface")
    port: int = setting(8000, port, "port to listen on; 0 for any free one")
    api_key: tuple[str, ...] = setting((), names, "keys that clients must send as a bearer token, separated by commas")
    served_model_name: tuple[str, ...] = setting(
        (), names, "names that clients may call the model by, separated by commas"
    )
    dtype: str = setting("float32", one_of("float32", "bfloat16"), "of the model's matrices")
    revision: str | None = setting(None, str, "branch, tag or commit of the model on the hub")
    route: str | None = setting(
        None, str, "which route to serve of a model that parts queries from documents (default: the model's own)"
    )
    cache_dir: Path | None = setting(None, Path, "folder for compiled executables (default: ~/.cache/jaxembed)")
    max_length: int | None = setting(None, integer(1), "tokens an input may have (default: the model's own number)")
    max_batch_tokens: int | None = setting(
        None, integer(1), "tokens a dispatch and device, padding included (default: by platform)"
    )
    refine_after: int = setting(
        5000,
        integer(0),
        "inputs after which shapes are chosen anew by the lengths that came; 0: never",
    )
    max_client_batch_size: int = setting(2048, integer(1), "inputs that one request may hold")
    max_request_tokens: int = setting(300_000, integer(1), "tokens that all inputs of one request may have together")
    max_queue_tokens: int = setting(
        1_000_000, integer(1), "tokens that may wait; a request that would exceed them is refused with 429"
    )
    max_body_bytes: int = setting(16 * 2**20, integer(1), "bytes that the body of a request may have")
    request_timeout: float = setting(120.0, seconds, "seconds after which a request is given up with 504")
    drain_timeout: float = setting(30.0, seconds, "seconds that a shutdown waits for the work in flight")
    matryoshka: str = setting(
        Policy.STRICT.value,
        one_of(*(policy.value for policy in Policy)),
        "what to do about `dimensions` that the model was not trained for: refuse, answer with a warning, or answer",
    )
    matryoshka_dimensions: tuple[int, ...] | None = setting(
        None, sizes, "declare the sizes that `dimensions` may ask of this model: 'any', or such as 256,128"
    )
    http_processes: int = setting(
        0, integer(0), "processes for HTTP and tokenising in front of the one with the model; 0: that one does it all"
    )
    access_log: bool = setting(False, flag, "log a line for each request")
    log_level: str = setting("info", one_of("debug", "info", "warning", "error"), "least severity that is logged")

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model; the first is the default's."""
        return self.served_model_name or (self.model,)


def from_sources(flags: Mapping[str, str], environ: Mapping[str, str]) -> ServerConfig:
    """Settings from flags (field name -> text), else from the environment, else the defaults.

    Raises:
        ConfigError: a value cannot be cast.
    """
    values: dict[str, Any] = {}
    for field in dataclasses.fields(ServerConfig):
        variable = ENV_PREFIX + field.name.upper()
        if field.name in flags:
            values[field.name] = read(field, flags[field.name], "--" + field.name.replace("_", "-"))
        elif environ.get(variable):
            values[field.name] = read(field, environ[variable], variable)
    return ServerConfig(**values)


def read(field: "dataclasses.Field[Any]", text: str, source: str) -> Any:
    """Cast one setting.

    Raises:
        ConfigError: names the source, the value and what is allowed.
    """
    try:
        return field.metadata["cast"](text)
    except ValueError as error:
        raise ConfigError(f"{source} is {text!r}; allowed: {error}") from None
