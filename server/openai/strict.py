"""The base of every body: nothing is converted, nothing is ignored, and a bad body is as cheap to refuse as a good one."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MAX_PAIRS = 16  # OpenAI's limit on metadata


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        """More fields than there are: one of them is unknown, and pydantic need not list a million (it takes seconds)."""
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            name = next(name for name in value if name not in cls.model_fields)
            raise PydanticCustomError("unknown_field", "", {"name": name[:200]})
        return value


def _few(value: object) -> object:
    if isinstance(value, dict) and len(value) > MAX_PAIRS:
        raise PydanticCustomError("too_many_pairs", "at most 16 pairs are allowed")
    return value


Pairs = Annotated[dict[str, str], BeforeValidator(_few)]
