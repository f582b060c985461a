"""GET /openapi.json, and /docs, which shows it to a person without fetching anything from elsewhere."""

from importlib.metadata import version

from quart import Blueprint, Response, redirect
from werkzeug.wrappers import Response as AnyResponse

from jaxembed_server.openapi import document, page
from jaxembed_server.service import Service

__all__ = ["blueprint"]


def blueprint(service: Service) -> Blueprint:
    """The API's description."""
    routes = Blueprint("docs", __name__)
    described = document(
        version=version("jaxembed"),
        model=service.config.names[0],
        max_items=service.config.max_client_batch_size,
        with_key=bool(service.config.api_key),
    )
    shown = page(described)

    @routes.get("/")
    async def root() -> Response | AnyResponse:
        return redirect("/docs")

    @routes.get("/openapi.json")
    async def openapi() -> dict[str, object]:
        return described

    @routes.get("/docs")
    async def docs() -> Response:
        return Response(shown, content_type="text/html; charset=utf-8")

    return routes
