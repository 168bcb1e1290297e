"""A request on its way from a gate to a replica, and what its answer begins with. Plain data: neither side interprets it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import msgspec

Headers = list[tuple[str, str]]
# Of one connection, not of the request; or made anew by whoever sends it on.
OWN_HEADERS = frozenset({"connection", "content-length", "host", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"})
PROXY_HEADERS = frozenset({"date", "server", "x-request-id"})  # of an answer: Ray Serve's proxy gives its own, the id alike


@dataclass(frozen=True, slots=True)
class Ask:
    """`prompt` is what a router that knows prefixes compares; it is never empty."""

    method: str
    path: str  # with the query
    headers: Headers
    body: bytes
    prompt: str


@dataclass(frozen=True, slots=True)
class Head:
    """The first thing a replica answers; bytes of the body follow."""

    status: int
    headers: Headers


def passed_on(headers: Headers, but: frozenset[str] = frozenset()) -> Headers:
    """What concerns more than one connection, `but` for these."""
    return [(name, value) for name, value in headers if name.lower() not in OWN_HEADERS | but]


def routing_text(body: bytes) -> str:
    """What two requests have to begin with alike to have a use for the same cache: the salt, then the prompt.

    Of anything that is no prompt, what nothing else begins with. A body that cannot be read is for the replica to refuse.
    """
    with contextlib.suppress(msgspec.DecodeError):
        fields = msgspec.json.decode(body)
        text = _text(fields.get("messages") or fields.get("prompt")) if isinstance(fields, dict) else ""
        if text:
            return f"{fields.get('cache_salt') or ''}\n{text}"
    return uuid4().hex


def _text(value: Any) -> str:
    """A string, token ids, messages, parts of a message, or lists of them, in their order."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        inner = _text(value.get("content") or value.get("text"))
        return f"{value.get('role', '')}\n{inner}\n" if inner else ""
    if isinstance(value, list):
        ids = all(isinstance(item, int) for item in value)
        return " ".join(map(str, value)) if ids else "".join(_text(item) for item in value)
    return ""
