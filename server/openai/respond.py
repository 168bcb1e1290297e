"""How an answer leaves: as one body or as a stream. Both end at once when the client goes away."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from server.openai.sse import EventStream, while_connected

if TYPE_CHECKING:
    from server.frontend import Frontend
    from server.openai.answer import Answer


async def respond(request: Request, front: Frontend, answer: Answer, stream: bool, slot: ExitStack) -> Response:
    """`slot` is given back when the last byte is out; for a stream that is after this returns."""
    seconds = front.config.request_timeout
    if stream:
        free = slot.pop_all().close
        failed = front.metrics.observe_failure
        return EventStream(answer.events(), answer.headers(), seconds=seconds, on_close=free, on_failure=failed)
    body = await while_connected(request.receive, answer.whole(), seconds)
    return Response(body, headers=answer.headers(), media_type="application/json")
