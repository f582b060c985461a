"""Failures as the API tells them: OpenAI's error object, and the one table exception -> status.

{"error": {"message", "type", "param", "code"}}: always all four keys. No path, stack or address leaves the server.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson

from jaxembed import errors

__all__ = [
    "TABLE",
    "ApiError",
    "DeadlineError",
    "NotReadyError",
    "QueueFullError",
    "from_exception",
    "invalid",
]

INVALID = "invalid_request_error"
SERVER = "server_error"
NO_RETRY = {"x-should-retry": "false"}


@dataclass
class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: HTTP status.
        message: names the field, the value and what is allowed.
        type: OpenAI's kind of error.
        param: the field concerned, such as "input[3]".
        code: the machine-readable kind.
        headers: to send along.
    """

    status: int
    message: str
    type: str = INVALID
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """The error object as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


class QueueFullError(errors.JaxembedError):
    """More work waits than may.

    Attributes:
        waiting, limit: tokens that wait, and that may.
        retry_after: seconds until the queue should have drained.
    """

    def __init__(self, waiting: int, limit: int, retry_after: float) -> None:
        super().__init__(
            f"the queue is full: {waiting} tokens are waiting, {limit} may; try again in {math.ceil(retry_after)} s"
        )
        self.waiting, self.limit = waiting, limit
        self.retry_after = retry_after


class NotReadyError(errors.JaxembedError):
    """The server is loading, warming up or shutting down.

    Attributes:
        state: what it is.
        retry_after: seconds after which to try again.
    """

    def __init__(self, state: str, retry_after: float = 1.0) -> None:
        super().__init__(f"the server is not ready: it is {state}")
        self.state = state
        self.retry_after = retry_after


class DeadlineError(errors.JaxembedError):
    """A request took longer than `--request-timeout`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the request was given up after {seconds:g} s")


class Answer(NamedTuple):
    """How a kind of exception is told."""

    status: int
    type: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = {}


INTERNAL = Answer(500, SERVER, "internal_error", headers=NO_RETRY)

TABLE: Mapping[type[Exception], Answer] = {
    errors.InputError: Answer(400, INVALID, "empty_input", "input"),
    errors.InputTypeError: Answer(400, INVALID, "invalid_type", "input"),
    errors.InputTooLongError: Answer(400, INVALID, "context_length_exceeded", "input"),
    errors.TokenIdError: Answer(400, INVALID, "invalid_token_id", "input"),
    errors.DimensionsError: Answer(400, INVALID, "invalid_dimensions", "dimensions"),
    errors.PromptNameError: Answer(400, INVALID, "invalid_value", "prompt_name"),
    errors.NonFiniteError: Answer(500, SERVER, "non_finite_embedding", headers=NO_RETRY),
    QueueFullError: Answer(429, "rate_limit_exceeded", "queue_full"),
    NotReadyError: Answer(503, SERVER, "not_ready"),
    DeadlineError: Answer(504, SERVER, "deadline_exceeded", headers=NO_RETRY),
    # What an operator must mend, and a client can do nothing about.
    errors.CheckpointError: INTERNAL,
    errors.BucketError: INTERNAL,
    errors.CompileError: INTERNAL,
    errors.WrongNumbersError: INTERNAL,
    errors.JaxembedError: INTERNAL,
    Exception: INTERNAL,
}
"""One line for each kind of failure; the line of the closest base class counts."""


def from_exception(error: Exception, *, single: bool = False) -> ApiError:
    """The answer to any exception.

    Args:
        error: what was raised.
        single: the request's `input` is one item, not a list of items: its index is left out.
    """
    if isinstance(error, ApiError):
        return error
    answer = next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)
    if answer.code == INTERNAL.code:
        # The cause may hold paths; it is in the log.
        message = "the server failed to answer this request"
        return ApiError(answer.status, message, answer.type, None, answer.code, answer.headers)
    message, param, code = str(error), answer.param, answer.code
    if isinstance(error, errors.InputError) and error.index is not None:
        param = f"input[{error.index}]"
        if isinstance(error, errors.TokenIdError):
            param += f"[{error.position}]"
        if single:
            message, param = message.replace("input[0]", "input", 1), param.replace("input[0]", "input", 1)
    if isinstance(error, errors.DimensionsError) and not error.supported:
        code = "dimensions_not_supported"
    headers = dict(answer.headers)
    if isinstance(error, (QueueFullError, NotReadyError)):
        headers |= retry_headers(error.retry_after)
    return ApiError(answer.status, message, answer.type, param, code, headers)


def retry_headers(after: float) -> dict[str, str]:
    """Both headers that OpenAI's clients obey; whole seconds and milliseconds."""
    return {"Retry-After": str(max(1, math.ceil(after))), "retry-after-ms": str(max(1, round(after * 1000)))}


def invalid(param: str | None, code: str, message: str, *, status: int = 400) -> ApiError:
    """An error in the client's request."""
    return ApiError(status, message, INVALID, param, code)
