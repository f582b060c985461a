"""One table for every kind of failure, and nothing of the inside in a message."""

import inspect

import pytest

from jaxembed import errors
from jaxembed_server import errors as server_errors
from jaxembed_server.errors import TABLE, ApiError, NotReadyError, QueueFullError, from_exception

KINDS = [
    kind
    for module in (errors, server_errors)
    for _, kind in inspect.getmembers(module, inspect.isclass)
    if issubclass(kind, errors.JaxembedError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_has_a_line_of_its_own_or_its_bases(kind: type[Exception]) -> None:
    lines = [base for base in kind.__mro__ if base in TABLE]
    assert lines[0] is not Exception
    assert issubclass(kind, errors.InputError) is (TABLE[lines[0]].status == 400)


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (errors.InputTooLongError(index=2, length=300, limit=256), 400, "input[2]", "context_length_exceeded"),
        (errors.TokenIdError(index=1, position=4, value=-1, vocab_size=10), 400, "input[1][4]", "invalid_token_id"),
        (errors.DimensionsError("no"), 400, "dimensions", "invalid_dimensions"),
        (errors.DimensionsError("no", supported=False), 400, "dimensions", "dimensions_not_supported"),
        (errors.PromptNameError("x", []), 400, "prompt_name", "invalid_value"),
        (errors.InputTypeError("no", index=0), 400, "input[0]", "invalid_type"),
        (errors.InputError("no", index=0), 400, "input[0]", "empty_input"),
        (QueueFullError(5, 4, 2.5), 429, None, "queue_full"),
        (NotReadyError("loading"), 503, None, "not_ready"),
        (server_errors.DeadlineError(3), 504, None, "deadline_exceeded"),
        (errors.NonFiniteError([0]), 500, None, "non_finite_embedding"),
        (RuntimeError("secret"), 500, None, "internal_error"),
        (errors.BucketError("secret"), 500, None, "internal_error"),
        (errors.CheckpointError("secret"), 500, None, "internal_error"),
    ],
)
def test_the_table(error: Exception, status: int, param: str | None, code: str) -> None:
    told = from_exception(error)
    assert (told.status, told.param, told.code) == (status, param, code)
    assert "secret" not in told.message
    assert (told.type == "invalid_request_error") is (status == 400)


def test_a_single_input_has_no_index() -> None:
    told = from_exception(errors.TokenIdError(index=0, position=4, value=-1, vocab_size=10), single=True)
    assert told.param == "input[4]"
    assert told.message.startswith("input[4] is the token id -1")
    told = from_exception(errors.InputTooLongError(index=0, length=300, limit=256), single=True)
    assert told.param == "input"


def test_retry_headers() -> None:
    assert from_exception(QueueFullError(5, 4, 2.5)).headers == {"Retry-After": "3", "retry-after-ms": "2500"}
    assert from_exception(NotReadyError("loading")).headers["Retry-After"] == "1"
    for hopeless in (RuntimeError(), errors.NonFiniteError([0]), server_errors.DeadlineError(3)):
        assert from_exception(hopeless).headers == {"x-should-retry": "false"}


def test_the_body_has_all_four_keys() -> None:
    assert ApiError(400, "m").body() == (
        b'{"error":{"message":"m","type":"invalid_request_error","param":null,"code":null}}'
    )


def test_an_answer_is_told_as_it_is() -> None:
    error = ApiError(418, "m")
    assert from_exception(error) is error
