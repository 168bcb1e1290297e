"""/openapi.json: FastAPI knows the routes, we know the bodies, because we parse them ourselves (server/openai/body.py)."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from server.openai.schema import ChatRequest, CompletionRequest
from server.openai.tokenize import DetokenizeRequest, TokenizeRequest

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
REF = "#/components/schemas/{model}"


def describe(app: FastAPI) -> None:
    """Makes app.openapi() name the bodies and the shape of errors."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend the document


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas["ErrorResponse"] = _error()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["responses"]["default"] = _content("ErrorResponse", "an error")
            if (model := BODIES.get(path)) is not None:
                schema = model.model_json_schema(ref_template=REF)
                schemas.update(schema.pop("$defs", {}))
                schemas[model.__name__] = schema
                operation["requestBody"] = {**_content(model.__name__), "required": True}
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    return document


def _content(name: str, description: str | None = None) -> dict[str, Any]:
    content = {"content": {"application/json": {"schema": {"$ref": REF.format(model=name)}}}}
    return content if description is None else {"description": description, **content}


def _error() -> dict[str, Any]:
    text, perhaps = {"type": "string"}, {"type": ["string", "null"]}
    fields = {"message": text, "type": text, "param": perhaps, "code": perhaps}
    error = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {"type": "object", "properties": {"error": error}, "required": ["error"], "additionalProperties": False}
