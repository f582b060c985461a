"""POST /v1/embeddings."""

from quart import Blueprint, Response, g, request

from jaxembed_server.errors import from_exception, invalid
from jaxembed_server.schemas import decode, encode
from jaxembed_server.service import Service

__all__ = ["blueprint"]


def blueprint(service: Service) -> Blueprint:
    """The route of the embeddings API."""
    routes = Blueprint("embeddings", __name__)
    max_items = service.config.max_client_batch_size

    @routes.post("/v1/embeddings")
    async def embeddings() -> Response:
        mimetype = request.mimetype
        if mimetype != "application/json" and not mimetype.endswith("+json"):
            raise invalid(
                None,
                "unsupported_media_type",
                f"the content type is {mimetype[:64]!r}; it must be 'application/json'",
                status=415,
            )
        asked = decode(await request.get_data(False, False, False), max_items=max_items)
        g.request_id = g.request_id or asked.request_id
        name = service.name(asked.model)
        try:
            vectors, tokens = await service.embed(asked)
        except Exception as error:
            answer = from_exception(error, single=asked.single)
            if answer is error:
                raise
            raise answer from error
        body = encode(asked, vectors, model=name, prompt_tokens=tokens)
        return Response(body, content_type="application/json")

    return routes
