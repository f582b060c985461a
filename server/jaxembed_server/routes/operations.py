"""Routes for operators: health, readiness, metrics, version."""

import platform
from importlib.metadata import version
from typing import Any

from quart import Blueprint, Response

from jaxembed_server.errors import NotReadyError, from_exception
from jaxembed_server.metrics import CONTENT_TYPE
from jaxembed_server.service import Service, State

__all__ = ["blueprint"]


def blueprint(service: Service) -> Blueprint:
    """Routes that need no key and answer in every state."""
    routes = Blueprint("operations", __name__)

    @routes.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @routes.route("/ping", methods=["GET", "POST"])
    async def ping() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/ready")
    async def ready() -> tuple[dict[str, Any], int, dict[str, str]]:
        progress = {"status": service.state.value, "warmed": service.warmed, "of": service.buckets}
        if service.state is State.READY:
            return progress, 200, {}
        refusal = from_exception(NotReadyError(service.state.value))
        return progress, refusal.status, dict(refusal.headers)

    @routes.get("/metrics")
    async def metrics() -> Response:
        return Response(await service.metrics_page(), content_type=CONTENT_TYPE)

    @routes.get("/version")
    async def versions() -> dict[str, str]:
        packages = ("jaxembed", "jax", "jaxlib", "flax", "transformers")
        return {name: version(name) for name in packages} | {
            "version": version("jaxembed"),
            "python": platform.python_version(),
        }

    return routes
