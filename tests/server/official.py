"""Whether a body is exactly what OpenAI's own types allow, apart from the fields we list as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jsonschema
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

Body = TypeVar("Body", bound=BaseModel)

# Fields that OpenAI does not have and clients may ask for, or ignore: vLLM's.
OURS = {
    ChatCompletion: {"prompt_logprobs", "prompt_token_ids"},
    ChatCompletionChunk: {"prompt_token_ids"},
    Completion: set(),
    Model: {"max_model_len"},
}
OUR_CHOICE_FIELDS = {"token_ids", "prompt_token_ids", "prompt_logprobs"}

SCHEMAS = {
    ChatCompletion: "CreateChatCompletionResponse",
    ChatCompletionChunk: "CreateChatCompletionStreamResponse",
    Completion: "CreateCompletionResponse",
    Model: "Model",
}


def check(body: dict[str, Any], kind: type[Body], openapi: Mapping[str, Any] | None = None) -> Body:
    """The body as an SDK object. Raises when a field is missing, of another type, or unknown."""
    plain = strip(body, kind)
    value = kind.model_validate(plain, strict=True)
    assert extras(value) == []
    if openapi is not None:
        validate_openapi(plain, SCHEMAS[kind], openapi)
    return value


def strip(body: dict[str, Any], kind: type[BaseModel]) -> dict[str, Any]:
    plain = {name: value for name, value in body.items() if name not in OURS[kind]}
    if "choices" in plain:
        plain["choices"] = [
            {name: value for name, value in choice.items() if name not in OUR_CHOICE_FIELDS} for choice in plain["choices"]
        ]
    # The types of /v1/completions are those of a whole body and forget what a stream's chunks hold: no finish reason
    # before the last, and the null `usage` that the description of stream_options demands. OpenAI's own server sends
    # both nulls, like every other, and so must we.
    if kind is Completion:
        for choice in plain["choices"]:
            if choice["finish_reason"] is None:
                choice["finish_reason"] = "stop"
        if plain.get("usage", 0) is None:
            del plain["usage"]
    return plain


def extras(value: Any, where: str = "") -> list[str]:
    """The names of all fields that OpenAI's types do not know, at any depth."""
    if isinstance(value, BaseModel):
        found = [f"{where}.{name}" for name in value.model_extra or {}]
        for name in type(value).model_fields:
            found += extras(getattr(value, name), f"{where}.{name}")
        return found
    if isinstance(value, list):
        return [name for i, part in enumerate(value) for name in extras(part, f"{where}[{i}]")]
    return []


def validate_openapi(body: dict[str, Any], name: str, openapi: Mapping[str, Any]) -> None:
    """Against the official document. OpenAPI 3.0's `nullable` is no word of JSON schema, so it is spelled out first."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": _spell_out(openapi["components"])}
    jsonschema.Draft202012Validator(schema).validate(body)


def _spell_out(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_spell_out(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    plain = {name: _spell_out(value) for name, value in schema.items() if name != "nullable"}
    if schema.get("nullable") is True:
        return {"anyOf": [{name: value for name, value in plain.items() if name != "default"}, {"type": "null"}]}
    return plain
