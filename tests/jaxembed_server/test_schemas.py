"""Bodies in and out: every field, every error that the body alone can show."""

import base64
import json
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxembed.tokenizer import TruncationSide
from jaxembed_server.errors import ApiError
from jaxembed_server.schemas import EmbeddingRequest, decode, encode

MAX_ITEMS = 3


def read(**fields: Any) -> EmbeddingRequest:
    return decode(json.dumps({"input": "text", **fields}).encode(), max_items=MAX_ITEMS)


def refusal(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as refused:
        decode(body, max_items=MAX_ITEMS)
    return refused.value


def test_a_string() -> None:
    request = read(input="text")
    assert (request.texts, request.token_ids, request.single) == (["text"], None, True)


def test_strings() -> None:
    request = read(input=["a", "b"])
    assert (request.texts, request.token_ids, request.single) == (["a", "b"], None, False)


def test_token_ids_are_one_input_and_not_limited_by_the_number_of_items() -> None:
    request = read(input=[1, 2, 3, 4, 5])
    assert (request.texts, request.token_ids, request.single) == (None, [[1, 2, 3, 4, 5]], True)


def test_arrays_of_token_ids() -> None:
    request = read(input=[[1], [2, 3]])
    assert (request.texts, request.token_ids, request.single) == (None, [[1], [2, 3]], False)


def test_defaults() -> None:
    request = decode(b'{"input": "text"}', max_items=MAX_ITEMS)
    assert request.model == ""
    assert request.encoding_format == "float"
    assert request.dimensions is request.truncate_prompt_tokens is request.normalize is None
    assert request.additional_data is None
    assert request.add_special_tokens
    assert request.truncation_side is TruncationSide.RIGHT


def test_null_is_absent() -> None:
    nulls = dict.fromkeys(
        "model encoding_format dimensions truncate_prompt_tokens truncation_side add_special_tokens user embed_dtype "
        "endianness use_activation normalize priority request_id prompt_name input_type prompt".split()
    )
    assert read(**nulls).encoding_format == "float"


def test_every_field() -> None:
    request = read(
        model="m",
        encoding_format="base64",
        dimensions=256,
        truncate_prompt_tokens=-1,
        truncation_side="left",
        add_special_tokens=False,
        embed_dtype="float16",
        endianness="big",
        use_activation=False,
        normalize=True,
        priority=-2,
        request_id="r",
        input_type="query",
        prompt="p: ",
        user="somebody",
        something_else={"ignored": True},
    )
    assert (request.model, request.encoding_format, request.dimensions) == ("m", "base64", 256)
    assert (request.truncate_prompt_tokens, request.truncation_side) == (-1, TruncationSide.LEFT)
    assert (request.add_special_tokens, request.embed_dtype, request.endianness) == (False, "float16", "big")
    assert (request.normalize, request.priority, request.request_id) == (False, -2, "r")
    assert (request.prompt_name, request.prompt) == ("query", "p: ")


def test_normalize_is_an_alias() -> None:
    assert read(normalize=True).normalize is True


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": None}, "input", "missing_required_parameter"),
        ({"input": ""}, "input", "empty_input"),
        ({"input": []}, "input", "empty_input"),
        ({"input": ["a", ""]}, "input[1]", "empty_input"),
        ({"input": [[1], []]}, "input[1]", "empty_input"),
        ({"input": 7}, "input", "invalid_type"),
        ({"input": {"a": 1}}, "input", "invalid_type"),
        ({"input": True}, "input", "invalid_type"),
        ({"input": ["a", 1]}, "input[1]", "invalid_type"),
        ({"input": [1, "a"]}, "input[1]", "invalid_type"),
        ({"input": ["a", None]}, "input[1]", "invalid_type"),
        ({"input": [None]}, "input[0]", "invalid_type"),
        ({"input": [1.5]}, "input[0]", "invalid_type"),
        ({"input": [1, True]}, "input[1]", "invalid_type"),
        ({"input": [[1], "a"]}, "input[1]", "invalid_type"),
        ({"input": [[1], [1, "a"]]}, "input[1][1]", "invalid_type"),
        ({"input": [[[1]]]}, "input[0][0]", "invalid_type"),
        ({"input": ["a"] * 4}, "input", "array_above_max_length"),
        ({"model": 3}, "model", "invalid_type"),
        ({"user": 3}, "user", "invalid_type"),
        ({"encoding_format": "int8"}, "encoding_format", "invalid_value"),
        ({"encoding_format": 1}, "encoding_format", "invalid_type"),
        ({"dimensions": 0}, "dimensions", "invalid_dimensions"),
        ({"dimensions": -1}, "dimensions", "invalid_dimensions"),
        ({"dimensions": 1.0}, "dimensions", "invalid_type"),
        ({"dimensions": "256"}, "dimensions", "invalid_type"),
        ({"dimensions": True}, "dimensions", "invalid_type"),
        ({"dimensions": 10**30}, "dimensions", "invalid_dimensions"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "invalid_value"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "invalid_value"),
        ({"truncate_prompt_tokens": "1"}, "truncate_prompt_tokens", "invalid_type"),
        ({"truncation_side": "middle"}, "truncation_side", "invalid_value"),
        ({"add_special_tokens": "no"}, "add_special_tokens", "invalid_type"),
        ({"embed_dtype": "int4"}, "embed_dtype", "invalid_value"),
        ({"endianness": "middle"}, "endianness", "invalid_value"),
        ({"normalize": 1}, "normalize", "invalid_type"),
        ({"priority": "high"}, "priority", "invalid_type"),
        ({"prompt": ["p"]}, "prompt", "invalid_type"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, code: str) -> None:
    error = refusal(json.dumps({"input": "text", **fields}).encode())
    assert (error.status, error.param, error.code, error.type) == (400, param, code, "invalid_request_error")
    assert error.message.startswith(param)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"input": "a"} trailing',
        b'{"input": NaN}',
        b'{"input": "\xff\xfe"}',
        b'{"input": "\\ud800"}',
        b"\x00\x01\x02",
        b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"input": "a", "additional_data": "\xff"}',
        b'{"input": "a", "additional_data": {"a": }}',
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    error = refusal(body)
    assert (error.status, error.param, error.code) == (400, None, "invalid_json")


def test_the_message_names_the_value_cut_short() -> None:
    error = refusal(json.dumps({"input": "a", "encoding_format": "x" * 1000}).encode())
    assert "xxx" in error.message
    assert "float, base64" in error.message
    assert len(error.message) < 200


@given(st.binary(max_size=200))
def test_garbage_never_raises_anything_else(body: bytes) -> None:
    try:
        decode(body, max_items=MAX_ITEMS)
    except ApiError as error:
        assert error.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["input", "model", "dimensions", "encoding_format", "prompt", "user"]), JSON))
def test_any_json_object_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        decode(json.dumps(fields).encode(), max_items=MAX_ITEMS)
    except ApiError as error:
        assert error.status == 400
        assert error.code


VECTORS = arrays(np.float32, (3, 5), elements=st.floats(-1, 1, width=32))


def answer(vectors: np.ndarray, **fields: Any) -> dict[str, Any]:
    return json.loads(encode(read(**fields), vectors, model="m", prompt_tokens=7))


@given(VECTORS)
def test_floats_come_back_as_the_same_float32(vectors: np.ndarray) -> None:
    data = answer(vectors)["data"]
    np.testing.assert_array_equal(np.array([one["embedding"] for one in data], np.float32), vectors)


@given(VECTORS)
def test_base64_is_little_endian_float32(vectors: np.ndarray) -> None:
    data = answer(vectors, encoding_format="base64")["data"]
    back = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in data]
    np.testing.assert_array_equal(np.stack(back), vectors)


@pytest.mark.parametrize(
    ("name", "dtype"), [("float32", np.float32), ("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
@pytest.mark.parametrize("endianness", ["little", "big", "native"])
def test_base64_in_other_types_and_orders(name: str, dtype: Any, endianness: str) -> None:
    vectors = np.array([[0.5, -1.25, 3.0]], np.float32)
    data = answer(vectors, encoding_format="base64", embed_dtype=name, endianness=endianness)["data"]
    raw = base64.b64decode(data[0]["embedding"])
    width = np.dtype(dtype).itemsize
    numbers = [raw[i : i + width] for i in range(0, len(raw), width)]
    if endianness == "big":
        numbers = [number[::-1] for number in numbers]
    np.testing.assert_array_equal(np.frombuffer(b"".join(numbers), dtype).astype(np.float32), vectors[0])


def test_the_answer_is_openais() -> None:
    assert answer(np.array([[0.5, 0.25]], np.float32)) == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}],
        "model": "m",
        "usage": {"prompt_tokens": 7, "total_tokens": 7},
    }


@pytest.mark.parametrize(
    "data", [b"null", b"0", b'"x"', b'{"b": 1, "a": [1.0, 1e400, 123456789012345678901234567890, "\xc3\xa9\\u00e9"]}']
)
def test_additional_data_comes_back_byte_for_byte(data: bytes) -> None:
    request = decode(b'{"input": "a", "additional_data": ' + data + b"}", max_items=MAX_ITEMS)
    body = encode(request, np.zeros((1, 2), np.float32), model="m", prompt_tokens=1)
    assert b'"additional_data":' + data in body


def test_additional_data_is_absent_when_it_was_not_sent() -> None:
    assert "additional_data" not in answer(np.zeros((1, 2), np.float32))
