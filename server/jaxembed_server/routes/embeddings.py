"""POST /v1/embeddings."""

from jaxembed_server.errors import from_exception
from jaxembed_server.exchange import Exchange
from jaxembed_server.json_route import JsonRoute
from jaxembed_server.schemas import decode, encode
from jaxembed_server.service import Service

__all__ = ["json_route"]


def json_route(service: Service) -> JsonRoute:
    """The route of the embeddings API."""
    max_items = service.config.max_client_batch_size

    async def embeddings(exchange: Exchange, body: bytes) -> bytes:
        asked = decode(body, max_items=max_items)
        exchange.request_id = exchange.request_id or asked.request_id
        name = service.name(asked.model)
        try:
            vectors, tokens = await service.embed(asked)
        except Exception as error:
            answer = from_exception(error, single=asked.single)
            if answer is error:
                raise
            raise answer from error
        return encode(asked, vectors, model=name, prompt_tokens=tokens)

    return JsonRoute("/v1/embeddings", embeddings, service.config, service.metrics)
