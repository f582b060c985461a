"""The Quart application: routes, keys, errors, request ids. `create_app(config)` is the factory."""

import asyncio
import hmac
import logging
import time
import uuid

from quart import Quart, Response, g, request
from quart.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException

from jaxembed_server.config import ServerConfig
from jaxembed_server.errors import ApiError, from_exception
from jaxembed_server.metrics import Metrics
from jaxembed_server.model import Loader, load_model
from jaxembed_server.routes import blueprints
from jaxembed_server.service import Service

__all__ = ["create_app", "service_of"]

logger = logging.getLogger(__name__)
access = logging.getLogger("jaxembed_server.access")

GUARDED = "/v1/"
"""Routes below this need a key, if keys are set."""

LONGEST_ID = 128

CODES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "payload_too_large",
}


def create_app(config: ServerConfig, loader: Loader = load_model, *, service: Service | None = None) -> Quart:
    """The application.

    Its start-up begins to load the model and returns; `service_of(app)` tells when it is ready.

    Args:
        config: the settings.
        loader: makes the model; another than the real one only in tests.
        service: in place of one that loads the model here.
    """
    app = Quart("jaxembed_server", static_folder=None)
    app.config.update(MAX_CONTENT_LENGTH=config.max_body_bytes, RESPONSE_TIMEOUT=None, PROVIDE_AUTOMATIC_OPTIONS=False)
    encoder = DefaultJSONProvider(app)
    encoder.sort_keys = False
    app.json = encoder
    service = service or Service(config, Metrics(), loader)
    app.extensions["jaxembed"] = service
    for blueprint in blueprints(service):
        app.register_blueprint(blueprint)
    loading: list[asyncio.Task[None]] = []

    @app.before_serving
    async def start() -> None:
        loading.append(asyncio.get_running_loop().create_task(service.start()))

    @app.after_serving
    async def stop() -> None:
        for task in loading:
            task.cancel()
        service.close()

    @app.before_request
    async def open_request() -> None:
        g.start = time.perf_counter()
        g.request_id = request.headers.get("x-request-id")
        if config.api_key and request.path.startswith(GUARDED):
            check_key(request.headers.get("Authorization", ""), config.api_key)

    @app.after_request
    async def close_request(response: Response) -> Response:
        response.headers["x-request-id"] = printable(g.get("request_id")) or uuid.uuid4().hex
        # The route's pattern, not its path: a metric must not have a label for each thing a stranger asks for.
        route = request.url_rule.rule if request.url_rule else "unknown"
        seconds = time.perf_counter() - g.get("start", time.perf_counter())
        service.metrics.request(route, response.status_code, seconds)
        if config.access_log:
            access.info("%s %s %d %.1f ms", request.method, route, response.status_code, seconds * 1000)
        return response

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        return answer(
            ApiError(
                status,
                explain(status, config),
                "invalid_request_error" if status < 500 else "server_error",
                None,
                CODES.get(status, "http_error" if status < 500 else "internal_error"),
                {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")},
            )
        )

    @app.errorhandler(Exception)
    async def any_error(error: Exception) -> Response:
        told = from_exception(error)
        if told.status == 500:
            logger.error("%s %s failed", request.method, request.path, exc_info=error)
        return answer(told)

    return app


def service_of(app: Quart) -> Service:
    """The service of an application made by `create_app`."""
    service = app.extensions["jaxembed"]
    assert isinstance(service, Service)
    return service


def explain(status: int, config: ServerConfig) -> str:
    """What to tell of an error of HTTP itself; nothing of the inside."""
    if status == 404:
        return f"there is no route {request.method} {request.path[:200]}; see /docs"
    if status == 405:
        return f"{request.path[:200]} does not take {request.method}; see /docs"
    if status == 413:
        return f"the body is larger than {config.max_body_bytes} bytes, which is the most that is allowed"
    if status == 408:
        return "the body did not arrive in time"
    return "the request could not be understood" if status < 500 else "the server failed to answer this request"


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


def answer(error: ApiError) -> Response:
    """An error as a response."""
    return Response(error.body(), error.status, headers=dict(error.headers), content_type="application/json")


def printable(name: str | None) -> str | None:
    """A request id that may stand in a header; None for any other."""
    return name if name and len(name) <= LONGEST_ID and name.isascii() and name.isprintable() else None
