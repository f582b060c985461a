"""The Quart application: routes, keys, errors, request ids. `create_app(config)` is the factory."""

import asyncio
from typing import Any, cast
from urllib.parse import urlsplit

from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from quart import Quart, Response, g, request
from quart.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException

from jaxembed_server.config import ServerConfig
from jaxembed_server.errors import ApiError
from jaxembed_server.exchange import Exchange
from jaxembed_server.json_route import JsonRoute
from jaxembed_server.metrics import Metrics
from jaxembed_server.model import Loader, load_model
from jaxembed_server.routes import blueprints, json_routes
from jaxembed_server.service import Service

__all__ = ["create_app", "service_of"]

CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed"}


class Application(Quart):
    """Quart, with routes before it that need none of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name, static_folder=None)
        self._json_routes: dict[str, JsonRoute] = {}

    def add_json_route(self, route: JsonRoute) -> None:
        """Have a route answer the POSTs of its path. Quart knows of it, for 405, and never comes to its view."""
        self._json_routes[route.path] = route
        self.add_url_rule(route.path, route.path, methods=["POST"])

    async def asgi_app(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Every message of the server comes in here."""
        if scope["type"] == "http" and scope["method"] == "POST":
            route = self._json_routes.get(scope["path"]) or self._json_routes.get(plain_path(scope))
            if route is not None:
                return await route(cast(Any, scope), cast(Any, receive), cast(Any, send))
        return await super().asgi_app(scope, receive, send)


def plain_path(scope: Any) -> str:
    """The path that Quart would look up: without a host, and without what the application is mounted at."""
    path: str = scope["path"]
    path = path if path.startswith("/") else urlsplit(path).path
    return path.removeprefix(scope.get("root_path", ""))


def create_app(config: ServerConfig, loader: Loader = load_model, *, service: Service | None = None) -> Quart:
    """The application.

    Its start-up begins to load the model and returns; `service_of(app)` tells when it is ready.

    Args:
        config: the settings.
        loader: makes the model; another than the real one only in tests.
        service: in place of one that loads the model here.
    """
    app = Application("jaxembed_server")
    app.config.update(MAX_CONTENT_LENGTH=config.max_body_bytes, RESPONSE_TIMEOUT=None, PROVIDE_AUTOMATIC_OPTIONS=False)
    encoder = DefaultJSONProvider(app)
    encoder.sort_keys = False
    app.json = encoder
    service = service or Service(config, Metrics(), loader)
    app.extensions["jaxembed"] = service
    for blueprint in blueprints(service):
        app.register_blueprint(blueprint)
    for route in json_routes(service):
        app.add_json_route(route)
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
        g.exchange = Exchange(
            config,
            service.metrics,
            method=request.method,
            path=request.path,
            request_id=request.headers.get("x-request-id"),
        )
        g.exchange.check_key(request.headers.get("Authorization", ""))

    @app.after_request
    async def close_request(response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "unknown"
        response.headers["x-request-id"] = g.exchange.close(route, response.status_code)
        return response

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        status = error.code or 500
        return answer(
            ApiError(
                status,
                explain(status),
                "invalid_request_error" if status < 500 else "server_error",
                None,
                CODES.get(status, "http_error" if status < 500 else "internal_error"),
                {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")},
            )
        )

    @app.errorhandler(Exception)
    async def any_error(error: Exception) -> Response:
        return answer(g.exchange.told(error))

    return app


def service_of(app: Quart) -> Service:
    """The service of an application made by `create_app`."""
    service = app.extensions["jaxembed"]
    assert isinstance(service, Service)
    return service


def explain(status: int) -> str:
    """What to tell of an error of HTTP itself; nothing of the inside."""
    if status == 404:
        return f"there is no route {request.method} {request.path[:200]}; see /docs"
    if status == 405:
        return f"{request.path[:200]} does not take {request.method}; see /docs"
    return "the request could not be understood" if status < 500 else "the server failed to answer this request"


def answer(error: ApiError) -> Response:
    """An error as a response."""
    return Response(error.body(), error.status, headers=dict(error.headers), content_type="application/json")
