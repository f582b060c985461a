"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from quart import Blueprint, Response

from jaxembed_server.service import Service

__all__ = ["blueprint"]


def blueprint(service: Service) -> Blueprint:
    """The routes that say what is served."""
    routes = Blueprint("models", __name__)

    def card(name: str) -> dict[str, Any]:
        loaded = service.loaded
        sizes = loaded.matryoshka
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "jaxembed",
            "root": service.config.model,
            "parent": None,
            "max_model_len": loaded.tokenizer.max_length,
            "embedding_dimension": loaded.engine.dimension,
            "matryoshka_dimensions": list(sizes.sizes) if sizes.trained and sizes.sizes else None,
            "is_matryoshka": sizes.trained,
            "prompts": sorted(loaded.checkpoint.prompts),
        }

    @routes.get("/v1/models")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in service.config.names]}

    @routes.get("/v1/models/<path:name>")
    async def one(name: str) -> dict[str, Any] | Response:
        return card(service.name(name))

    return routes
