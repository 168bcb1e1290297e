"""The extension field `speculation`: what a request may choose, within what the server was started with.

It is not how speculation is configured: that is the operator's, and a name the server does not run is 400.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from engine.messages import EngineInfo
from engine.request import Speculation
from server.openai.errors import ApiError, invalid
from server.openai.strict import Strict

MAX_NAMES = 16
MAX_NAME_CHARS = 64
INT32 = 1 << 31

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


NameList = Annotated[list[Name], Field(min_length=1, max_length=MAX_NAMES, fail_fast=True)]
Names = Annotated[NameList, BeforeValidator(_as_list, json_schema_input_type=Name | NameList)]


class SpeculationFields(Strict):
    drafter: Names | None = None  # only these
    max_nodes: int | None = Field(None, ge=0, lt=INT32)  # most draft nodes per step; 0 is plain decoding
    verifier: Name | None = None


def _off(value: Any) -> Any:
    """ "off" is short for no draft nodes at all."""
    if value == "off" and isinstance(value, str):
        return SpeculationFields(max_nodes=0)
    if value is not None and not isinstance(value, dict):
        raise PydanticCustomError("speculation", 'expected "off" or an object')
    return value


Choice = Annotated[
    SpeculationFields | None, BeforeValidator(_off, json_schema_input_type=Literal["off"] | SpeculationFields | None)
]


def to_speculation(fields: SpeculationFields | None, info: EngineInfo) -> Speculation:
    """Raises ApiError 400 for a drafter or verifier this server does not run, and for more nodes than it ever drafts."""
    if fields is None:
        return Speculation()
    if fields.drafter is not None and not set(fields.drafter) <= set(info.drafters):
        raise _unknown("drafter", info.drafters)
    if fields.verifier is not None and fields.verifier not in (verifiers := selectable(info)):
        raise _unknown("verifier", verifiers)
    limit = info.max_budget
    if fields.max_nodes is not None and fields.max_nodes > limit:
        message = f"Invalid 'speculation.max_nodes': this server drafts at most {limit} nodes per step."
        raise invalid(message, "speculation.max_nodes")
    if fields.max_nodes == 0:
        return Speculation(off=True)
    drafters = None if fields.drafter is None else list(dict.fromkeys(fields.drafter))
    return Speculation(drafters=drafters, max_nodes=fields.max_nodes, verifier=fields.verifier)


def selectable(info: EngineInfo) -> list[str]:
    """The verifiers a request may name: the server's own and the lossless ones beside it."""
    return list(dict.fromkeys([info.verifier, *info.verifiers]))


def is_lossless(speculation: Speculation, info: EngineInfo) -> bool:
    """Whether the answer is certainly one the model itself would have given: nothing drafted, or a lossless verifier."""
    if speculation.off or info.lossless:
        return True
    return speculation.verifier is not None and speculation.verifier in info.verifiers


def _unknown(kind: str, known: list[str]) -> ApiError:
    return invalid(f"Invalid 'speculation.{kind}': this server has {', '.join(known)}.", f"speculation.{kind}")
