"""The API's own description: an OpenAPI 3.1 document, and a page that shows it. What stands here is true today."""

import copy
import html
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["document", "page"]

ERROR_CODES = {
    "400": "The request is not valid; `param` names the field.",
    "401": "No key, or a wrong one.",
    "404": "No such model.",
    "413": "The body is too large.",
    "415": "The content type is not JSON.",
    "429": "The queue is full; try again after `Retry-After` seconds.",
    "500": "The server failed.",
    "503": "Loading, warming up or shutting down; try again after `Retry-After` seconds.",
    "504": "The request took too long.",
}

FIELDS: Mapping[str, Mapping[str, Any]] = {
    "model": {
        "type": "string",
        "description": "A name from /v1/models. Absent or empty: the default model.",
    },
    "input": {
        "description": "What to embed. A flat array of integers is one input of token ids; token ids are used exactly "
        "as given, without special tokens.",
        "oneOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "minItems": 1, "items": {"type": "string", "minLength": 1}},
            {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
            {"type": "array", "minItems": 1, "items": {"type": "array", "minItems": 1, "items": {"type": "integer"}}},
        ],
    },
    "encoding_format": {
        "type": "string",
        "enum": ["float", "base64"],
        "default": "float",
        "description": "base64: the bytes of the vector, float32 and little-endian unless asked otherwise.",
    },
    "dimensions": {
        "type": ["integer", "null"],
        "minimum": 1,
        "description": "Size to cut vectors to, before they are normalised; for models trained with matryoshka "
        "representation. The full size is always allowed.",
    },
    "truncate_prompt_tokens": {
        "type": ["integer", "null"],
        "minimum": -1,
        "description": "Cut inputs to this many tokens, special tokens included; -1: to the model's maximum. "
        "Absent: an over-long input is an error.",
    },
    "truncation_side": {
        "type": "string",
        "enum": ["right", "left"],
        "default": "right",
        "description": "Which end is cut.",
    },
    "add_special_tokens": {
        "type": "boolean",
        "default": True,
        "description": "Put the model's special tokens around texts.",
    },
    "additional_data": {"description": "Any JSON; returned unchanged in the response."},
    "user": {"type": "string", "description": "Accepted, not stored."},
    "embed_dtype": {
        "type": "string",
        "enum": ["float32", "float16", "bfloat16"],
        "default": "float32",
        "description": "With base64: the type of the numbers.",
    },
    "endianness": {
        "type": "string",
        "enum": ["little", "big", "native"],
        "default": "little",
        "description": "With base64: the order of the bytes; native is little.",
    },
    "use_activation": {
        "type": ["boolean", "null"],
        "description": "L2-normalise the vectors; absent: as the model says. `normalize` is the same.",
    },
    "prompt_name": {
        "type": "string",
        "description": "Which of the model's prompts to put before each text; of a model with task adapters, the task "
        "too. `input_type` is the same.",
    },
    "prompt": {"type": "string", "description": "A text to put before each text; wins over `prompt_name`."},
    "priority": {"type": "integer", "default": 0, "description": "Lower goes first."},
    "request_id": {"type": "string", "description": "Echoed as `x-request-id`; the header of that name wins."},
}

EMBEDDING = {
    "type": "object",
    "properties": {
        "object": {"const": "embedding"},
        "index": {"type": "integer", "description": "Index in the input array."},
        "embedding": {
            "oneOf": [{"type": "array", "items": {"type": "number"}}, {"type": "string"}],
            "description": "The vector, as numbers or as base64.",
        },
    },
}

RESPONSE = {
    "type": "object",
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": EMBEDDING},
        "model": {"type": "string"},
        "usage": {
            "type": "object",
            "properties": {
                "prompt_tokens": {"type": "integer", "description": "Tokens that were run."},
                "total_tokens": {"type": "integer"},
            },
        },
        "additional_data": {"description": "As it was sent; absent when it was not."},
    },
}

ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document(*, version: str, model: str, max_items: int, with_key: bool) -> dict[str, object]:
    """The OpenAPI document of a server with these settings."""

    def operation(summary: str, **more: object) -> dict[str, object]:
        return {"summary": summary, "responses": {"200": {"description": "OK"}}, **more}

    fields: dict[str, Any] = copy.deepcopy(dict(FIELDS))
    for shape in fields["input"]["oneOf"]:
        if shape.get("items", {}).get("type") in ("string", "array"):
            shape["maxItems"] = max_items
    embeddings = {
        "summary": "Vectors of texts or token ids",
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"type": "object", "required": ["input"], "properties": fields},
                    "example": {"model": model, "input": "The quick brown fox jumps over the lazy dog"},
                }
            },
        },
        "responses": {
            "200": {"description": "OK", "content": {"application/json": {"schema": RESPONSE}}},
            **{
                status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
                for status, text in ERROR_CODES.items()
            },
        },
    }
    name = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    paths: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"post": embeddings},
        "/v1/models": {"get": operation("What is served")},
        "/v1/models/{id}": {"get": operation("One served model", parameters=[name])},
        "/health": {"get": operation("The process is alive")},
        "/ready": {"get": operation("200 once every shape is compiled; until then 503 with the progress")},
        "/ping": {"get": operation("The process is alive"), "post": operation("The process is alive")},
        "/metrics": {"get": operation("Prometheus metrics")},
        "/version": {"get": operation("Versions of the packages")},
        "/openapi.json": {"get": operation("This document")},
        "/docs": {"get": operation("This document as a page")},
    }
    described: dict[str, object] = {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxembed",
            "version": version,
            "description": "Text embeddings on JAX, in OpenAI's format.",
        },
        "paths": paths,
    }
    if with_key:
        described["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        for path, operations in paths.items():
            if path.startswith("/v1/"):
                for one in operations.values():
                    one["security"] = [{"key": []}]
    return described


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1e21; }
h2 { margin-top: 2.5rem; } code, pre { font: 14px/1.5 ui-monospace, monospace; background: #f3f4f6; }
code { padding: .1rem .3rem; border-radius: 4px; } pre { padding: 1rem; border-radius: 6px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top; padding: .4rem .6rem;
border-bottom: 1px solid #e2e4e8; } .verb { font-weight: 600; color: #0b63c5; }
"""


def page(described: Mapping[str, Any]) -> str:
    """The document as one HTML page that needs nothing from elsewhere."""
    post = described["paths"]["/v1/embeddings"]["post"]
    body = post["requestBody"]["content"]["application/json"]
    example = json.dumps(body["example"], indent=2)
    rows = "".join(
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind(field))}</td>"
        f"<td>{escape(field.get('description', ''))}</td></tr>"
        for name, field in body["schema"]["properties"].items()
    )
    errors = "".join(
        f"<tr><td><code>{escape(status)}</code></td><td>{escape(answer['description'])}</td></tr>"
        for status, answer in post["responses"].items()
        if status != "200"
    )
    others = "".join(
        f"<tr><td><span class=verb>{escape(verb.upper())}</span> <code>{escape(path)}</code></td>"
        f"<td>{escape(operation['summary'])}</td></tr>"
        for path, operations in described["paths"].items()
        for verb, operation in operations.items()
    )
    info = described["info"]
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(info['title'])} API</title>"
        f"<meta name=viewport content='width=device-width'><style>{STYLE}</style></head><body>"
        f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{escape(info['description'])} "
        "The same as a document for programs: <a href=/openapi.json>/openapi.json</a>.</p>"
        f"<h2>Routes</h2><table>{others}</table>"
        f"<h2><span class=verb>POST</span> /v1/embeddings</h2><pre>{escape(example)}</pre>"
        f"<table><tr><th>Field</th><th>Type</th><th>Meaning</th></tr>{rows}</table>"
        "<h2>Errors</h2><p>Always <code>{&quot;error&quot;: {message, type, param, code}}</code>.</p>"
        f"<table>{errors}</table></body></html>"
    )


def kind(field: Mapping[str, Any]) -> str:
    """A field's type in a few words."""
    if "enum" in field:
        return " | ".join(field["enum"])
    if "oneOf" in field:
        return "string | [string] | [int] | [[int]]"
    given = field.get("type", "any")
    return given if isinstance(given, str) else " | ".join(given)


def escape(value: object) -> str:
    return html.escape(str(value))
