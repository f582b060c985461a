"""The body of POST /v1/embeddings <-> frozen values: decoded and validated once, encoded once. Knows no model.

What depends on the model (its length, vocabulary, sizes, prompts) is checked where the model is known; here, what can
be known from the body alone.
"""

import base64
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import numpy.typing as npt
import orjson

from jaxembed.tokenizer import TruncationSide
from jaxembed_server.errors import ApiError, invalid

__all__ = ["EmbeddingRequest", "decode", "encode"]

ENCODING_FORMATS = ("float", "base64")
EMBED_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ENDIANNESS = ("little", "big", "native")
SHOWN = 64
"""Characters of a bad value that a message repeats."""


class EmbeddingRequest(msgspec.Struct, frozen=True, eq=False, kw_only=True, gc=False):
    """A valid request.

    Attributes:
        texts: the inputs, when they are strings; else None.
        token_ids: the inputs, when they are token ids; else None.
        single: `input` was one item, not a list of items.
        model: the name asked for; "" for the default.
        additional_data: the JSON value as it was sent, byte for byte; None when it was not sent.
        truncate_prompt_tokens: -1 for the model's maximum, k for k tokens, None to refuse over-long inputs.

    The other fields are as in the API's documentation.
    """

    texts: Sequence[str] | None
    token_ids: Sequence[Sequence[int]] | None
    single: bool
    model: str = ""
    encoding_format: str = "float"
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: TruncationSide = TruncationSide.RIGHT
    add_special_tokens: bool = True
    additional_data: bytes | None = None
    embed_dtype: str = "float32"
    endianness: str = "little"
    normalize: bool | None = None
    priority: int = 0
    request_id: str | None = None
    prompt_name: str | None = None
    prompt: str | None = None


def decode(body: bytes, *, max_items: int) -> EmbeddingRequest:
    """Read and check a body.

    Args:
        body: what was sent.
        max_items: inputs that it may hold.

    Raises:
        ApiError: names the field, the value and what is allowed.
    """
    try:
        fields = BODY.decode(body)
        # It is handed through as it came. That it is JSON has been seen, but not that it is UTF-8.
        data = bytes(fields.additional_data)
        data.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(None, "invalid_json", f"the body must be a JSON object: {reason}") from None
    read = Fields(fields)
    if read.value("input") is None:
        raise invalid("input", "missing_required_parameter", "input is required: a string, or an array")
    texts, token_ids, single = read_input(read.value("input"), max_items)
    return EmbeddingRequest(
        texts=texts,
        token_ids=token_ids,
        single=single,
        model=read.string("model") or "",
        encoding_format=read.choice("encoding_format", ENCODING_FORMATS),
        dimensions=read.integer("dimensions", least=1, code="invalid_dimensions"),
        truncate_prompt_tokens=read.integer("truncate_prompt_tokens", least=-1, but=0),
        truncation_side=TruncationSide(read.choice("truncation_side", tuple(TruncationSide))),
        add_special_tokens=read.boolean("add_special_tokens") is not False,
        additional_data=data or None,
        embed_dtype=read.choice("embed_dtype", tuple(EMBED_DTYPES)),
        endianness=read.choice("endianness", ENDIANNESS),
        normalize=read.first_boolean("use_activation", "normalize"),
        priority=read.integer("priority") or 0,
        request_id=read.string("request_id"),
        prompt_name=read.string("prompt_name") or read.string("input_type"),
        prompt=read.string("prompt"),
    )


class Body(msgspec.Struct, gc=False):
    """Every field that is looked at; others are ignored, as clients of a compatible server expect.

    Of any type: the errors that a type would give name neither the value nor all that is allowed.
    """

    input: Any = None
    model: Any = None
    encoding_format: Any = None
    dimensions: Any = None
    truncate_prompt_tokens: Any = None
    truncation_side: Any = None
    add_special_tokens: Any = None
    additional_data: msgspec.Raw = msgspec.Raw()
    embed_dtype: Any = None
    endianness: Any = None
    use_activation: Any = None
    normalize: Any = None
    priority: Any = None
    request_id: Any = None
    prompt_name: Any = None
    input_type: Any = None
    prompt: Any = None
    user: Any = None


BODY = msgspec.json.Decoder(Body)


class Fields:
    """Typed access to decoded fields; null counts as absent. Each method raises ApiError for another type."""

    def __init__(self, values: Body) -> None:
        self._values = values
        self.string("user")

    def value(self, name: str) -> Any:
        return getattr(self._values, name)

    def string(self, name: str) -> str | None:
        value = self.value(name)
        if value is not None and not isinstance(value, str):
            raise wrong_type(name, "a string", value)
        return value

    def boolean(self, name: str) -> bool | None:
        value = self.value(name)
        if value is not None and not isinstance(value, bool):
            raise wrong_type(name, "true or false", value)
        return value

    def first_boolean(self, *names: str) -> bool | None:
        """The first of several names for one field that was sent."""
        return next((value for value in map(self.boolean, names) if value is not None), None)

    def choice(self, name: str, allowed: Sequence[str]) -> str:
        """One of `allowed`; the first when absent."""
        value = self.string(name)
        if value is None:
            return allowed[0]
        if value not in allowed:
            listed = ", ".join(map(str, allowed))
            raise invalid(name, "invalid_value", f"{name} is {shown(value)}; allowed: {listed}")
        return value

    def integer(
        self, name: str, *, least: int | None = None, but: int | None = None, code: str = "invalid_value"
    ) -> int | None:
        """A whole number of at least `least`, except `but`."""
        value = self.value(name)
        if value is None:
            return None
        if type(value) is not int:
            raise wrong_type(name, "an integer", value)
        if (least is not None and value < least) or value == but:
            allowed = f"at least {least}" + (f", but not {but}" if but is not None else "")
            raise invalid(name, code, f"{name} is {shown(value)}; allowed: {allowed}")
        if abs(value) >= 2**63:
            raise invalid(name, code, f"{name} is {shown(value)}; that is too large a number")
        return value


Inputs = tuple[Sequence[str] | None, Sequence[Sequence[int]] | None, bool]


def read_input(value: Any, max_items: int) -> Inputs:
    """`input` as (texts, token ids, single)."""
    if isinstance(value, str):
        if not value:
            raise empty("input", "string")
        return [value], None, True
    if not isinstance(value, list):
        raise wrong_type("input", "a string, an array of strings, or token ids", value)
    if not value:
        raise empty("input", "array")
    first = type(value[0])
    if first is int:
        check_items(value, int, "input", "an integer, as the items before it are")
        return None, [value], True
    if len(value) > max_items:
        raise invalid("input", "array_above_max_length", f"input holds {len(value)} items; allowed: 1 to {max_items}")
    if first is str:
        check_items(value, str, "input", "a string, as the items before it are")
        for index, text in enumerate(value):
            if not text:
                raise empty(f"input[{index}]", "string")
        return value, None, False
    check_items(value, list, "input", "a string or an array of token ids")
    for index, ids in enumerate(value):
        if not ids:
            raise empty(f"input[{index}]", "array")
        check_items(ids, int, f"input[{index}]", "an integer, a token id")
    return None, value, False


def check_items(items: list[Any], kind: type, name: str, wanted: str) -> None:
    """Every item is exactly of this type (true is no integer)."""
    if set(map(type, items)) != {kind}:
        index = next(i for i, item in enumerate(items) if type(item) is not kind)
        raise wrong_type(f"{name}[{index}]", wanted, items[index])


def wrong_type(param: str, wanted: str, value: Any) -> ApiError:
    """A value of the wrong JSON type."""
    return invalid(param, "invalid_type", f"{param} is {shown(value)}; it must be {wanted}")


def empty(param: str, kind: str) -> ApiError:
    """An input without content."""
    return invalid(param, "empty_input", f"{param} is an empty {kind}; it must not be empty")


def shown(value: Any) -> str:
    """A value as JSON, cut short."""
    text = msgspec.json.encode(value).decode() if not isinstance(value, (list, dict)) else f"an {kind_of(value)}"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def kind_of(value: list[Any] | dict[str, Any]) -> str:
    return "array" if isinstance(value, list) else "object"


def encode(request: EmbeddingRequest, vectors: npt.NDArray[np.float32], *, model: str, prompt_tokens: int) -> bytes:
    """The response's body.

    Args:
        request: what it answers.
        vectors: float32 [n, d], finite.
        model: the name to report.
        prompt_tokens: tokens that were really run.
    """
    rows: Any = vectors
    if request.encoding_format == "base64":
        typed = vectors.astype(EMBED_DTYPES[request.embed_dtype], copy=False)
        # Everything we run on is little-endian, so native is little.
        if request.endianness == "big":
            typed = typed.view(f"u{typed.itemsize}").byteswap()
        rows = [base64.b64encode(row.tobytes()).decode("ascii") for row in typed]
    answer: dict[str, Any] = {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)],
        "model": model,
        "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
    }
    if request.additional_data is not None:
        answer["additional_data"] = orjson.Fragment(request.additional_data)
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
