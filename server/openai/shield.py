"""Whatever goes wrong inside becomes an answer of OpenAI's shape. Pure ASGI, outside of everything but the request id."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.openai.errors import ApiError, internal
from server.openai.sse import ClientGone

if TYPE_CHECKING:
    from server.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is there to read it, but access logs are


class Shield:
    """Answers ApiErrors, counts them, and logs what nobody expected; a client never sees a traceback."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as failure:
            if started:
                raise  # too late for an answer: the server cuts the connection, which is the only honest sign left
            await self._answer(failure, scope)(scope, receive, send)

    def _answer(self, failure: Exception, scope: Scope) -> Response:
        if not isinstance(failure, (ApiError, ClientGone)):
            log.error("request %s failed", scope.get("request_id"), exc_info=failure)
            failure = internal()
        self.metrics.observe_failure(failure)
        return failure.response() if isinstance(failure, ApiError) else Response(status_code=CLIENT_CLOSED_REQUEST)
