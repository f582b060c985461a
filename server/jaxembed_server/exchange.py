"""What holds for every request whichever way it is answered: its key, its id, its count and its line in the log.

Knows neither Quart nor ASGI: `app` calls it from Quart's hooks, `json_route` without Quart.
"""

import hmac
import logging
import random
import time

from jaxembed_server.config import ServerConfig
from jaxembed_server.errors import ApiError, from_exception
from jaxembed_server.metrics import Metrics

__all__ = ["Exchange", "access"]

logger = logging.getLogger(__name__)
access = logging.getLogger("jaxembed_server.access")
"""A line for each request, where the settings ask for it."""

GUARDED = "/v1/"
"""Routes below this need a key, if keys are set."""

LONGEST_ID = 128


class Exchange:
    """One request and its answer.

    Args:
        config: the settings.
        metrics: counts it.
        method, path: of the request.
        request_id: from the header `x-request-id`; None without one.

    Attributes:
        request_id: what the client calls the request; None if it does not say.
    """

    __slots__ = ("_config", "_method", "_metrics", "_path", "_start", "request_id")

    def __init__(
        self, config: ServerConfig, metrics: Metrics, *, method: str, path: str, request_id: str | None
    ) -> None:
        self._start = time.perf_counter()
        self._config = config
        self._metrics = metrics
        self._method = method
        self._path = path
        self.request_id = request_id

    def check_key(self, authorization: str) -> None:
        """See that the client may ask, if keys are set.

        Raises:
            ApiError: 401, the key is missing or wrong.
        """
        if self._config.api_key and self._path.startswith(GUARDED):
            check_key(authorization, self._config.api_key)

    def told(self, error: Exception) -> ApiError:
        """The answer to an exception; what is the server's own fault is logged."""
        told = from_exception(error)
        if told.status == 500:
            logger.error("%s %s failed", self._method, self._path, exc_info=error)
        return told

    def close(self, route: str, status: int) -> str:
        """Count the answer and log it.

        Args:
            route: its pattern, not its path: a metric must not have a label for each thing a stranger asks for.
            status: HTTP status.

        Returns:
            What to send as `x-request-id`.
        """
        seconds = time.perf_counter() - self._start
        self._metrics.request(route, status, seconds)
        if self._config.access_log:
            access.info("%s %s %d %.1f ms", self._method, route, status, seconds * 1000)
        # No secret: it has to be another than the others, and the system's generator costs a call to the kernel.
        return printable(self.request_id) or f"{random.getrandbits(128):032x}"


def check_key(header: str, keys: tuple[str, ...]) -> None:
    """Compare a bearer token with every key, in time that does not tell how much of it was right.

    Raises:
        ApiError: 401, missing or wrong.
    """
    scheme, _, token = header.partition(" ")
    challenge = {"WWW-Authenticate": "Bearer"}
    if scheme.lower() != "bearer" or not token.strip():
        message = "no API key was sent; send the header 'Authorization: Bearer KEY'"
        raise ApiError(401, message, "invalid_request_error", None, "missing_api_key", challenge)
    given = token.strip().encode()
    if not any([hmac.compare_digest(given, key.encode()) for key in keys]):
        raise ApiError(401, "the API key is wrong", "invalid_request_error", None, "invalid_api_key", challenge)


def printable(name: str | None) -> str | None:
    """A request id that may stand in a header; None for any other."""
    return name if name and len(name) <= LONGEST_ID and name.isascii() and name.isprintable() else None
