"""One file a group of routes; each makes a blueprint around a Service."""

from quart import Blueprint

from jaxembed_server.routes import docs, embeddings, models, operations
from jaxembed_server.service import Service

__all__ = ["blueprints"]


def blueprints(service: Service) -> list[Blueprint]:
    """Every group of routes."""
    return [make(service) for make in (embeddings.blueprint, models.blueprint, operations.blueprint, docs.blueprint)]
