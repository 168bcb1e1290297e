"""The chunks of a stream as bytes. What never changes in one answer is encoded once; a token costs one string."""

from __future__ import annotations

from typing import Any

import msgspec

from server.openai.sse import event, quote

NULL = b"null"


class Chunks:
    """`head`: the fields all chunks share. `usage`: every chunk has a usage, null until the last."""

    def __init__(self, head: dict[str, Any], usage: bool) -> None:
        self.head = head
        self._start = b"data: " + msgspec.json.encode(head)[:-1] + b',"choices":['
        self._end = b'],"usage":null}\n\n' if usage else b"]}\n\n"

    def chunk(self, choice: bytes, usage: dict[str, Any] | None = None, extra: dict[str, Any] | None = None) -> bytes:
        """One choice's news. `usage`: tokens so far, where a client wants them in every chunk; `extra`: further fields."""
        if not (usage or extra):
            return self._start + choice + self._end
        fields = b"".join(b"," + msgspec.json.encode(part)[1:-1] for part in (extra, usage and {"usage": usage}) if part)
        return self._start + choice + b"]" + fields + (b"}\n\n" if usage else self._end[1:])

    def last(self, usage: dict[str, Any], extra: dict[str, Any]) -> bytes:
        """The chunk that only carries the usage, and what else is known at the end."""
        return event(msgspec.json.encode(self.head | {"choices": [], "usage": usage} | extra))


def choice(index: int, field: bytes, logprobs: dict[str, Any] | None, finish_reason: str | None, extra: dict[str, Any]) -> bytes:
    """`field` is what differs between the routes: b'"delta":{...}' or b'"text":"..."'."""
    head = b'{"index":%d,%b,"logprobs":' % (index, field)
    shown = NULL if logprobs is None else msgspec.json.encode(logprobs)
    more = b"," + msgspec.json.encode(extra)[1:-1] if extra else b""
    reason = NULL if finish_reason is None else b'"%b"' % finish_reason.encode()
    return b'%b%b,"finish_reason":%b%b}' % (head, shown, reason, more)


def delta(text: str) -> bytes:
    return b'"delta":{"content":' + quote(text) + b"}" if text else b'"delta":{}'


def completion_text(text: str) -> bytes:
    return b'"text":' + quote(text)
