"""OpenAI's fields that this server does not implement: a value that changes nothing passes, any other is refused by name."""

from __future__ import annotations

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError


def only(*inert: object) -> BeforeValidator:
    """Accepts null and the values in `inert`; anything else is 400 `unsupported_parameter`."""

    def check(value: object) -> object:
        if value is None or any(type(value) is type(known) and value == known for known in inert):
            return value
        raise PydanticCustomError("unsupported", "this server does not support it")

    return BeforeValidator(check)
