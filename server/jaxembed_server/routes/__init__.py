"""One file a group of routes; each makes a blueprint, or a route that needs none of Quart, around a Service."""

from quart import Blueprint

from jaxembed_server.json_route import JsonRoute
from jaxembed_server.routes import docs, embeddings, models, operations
from jaxembed_server.service import Service

__all__ = ["blueprints", "json_routes"]


def blueprints(service: Service) -> list[Blueprint]:
    """Every group of routes that Quart answers."""
    return [make(service) for make in (models.blueprint, operations.blueprint, docs.blueprint)]


def json_routes(service: Service) -> list[JsonRoute]:
    """The routes that do the work of the server."""
    return [embeddings.json_route(service)]
