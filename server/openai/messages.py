"""The messages of a chat as the client writes them, and as the chat template gets them. Text only."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.openai.strict import Pairs, Strict
from server.openai.unsupported import only

MAX_MESSAGES = 4096
MAX_PARTS = 1024


class TextPart(Strict):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Pairs | None = None  # a hint; our prefix cache needs none


def _as_parts(value: object) -> object:
    if isinstance(value, str):
        return [TextPart(type="text", text=value)]
    if isinstance(value, list):
        return value
    raise PydanticCustomError("content_type", "expected a text or a list of text parts")


Text = Annotated[
    list[TextPart],
    Field(min_length=1, max_length=MAX_PARTS, fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart]),
]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    name: str | None = None
    # What the SDK's own response objects carry when a client sends an answer back as history.
    refusal: Annotated[None, only()] = None
    parsed: Annotated[None, only()] = None
    tool_calls: Annotated[list[None] | None, only([])] = None
    function_call: Annotated[None, only()] = None
    audio: Annotated[None, only()] = None
    annotations: Annotated[list[None] | None, only([])] = None

    def for_template(self) -> dict[str, str]:
        """Templates of open models know `system`, not OpenAI's later name `developer`, and take one string per message."""
        message = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "\n".join(part.text for part in self.content),
        }
        return message if self.name is None else message | {"name": self.name}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
