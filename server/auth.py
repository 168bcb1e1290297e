"""API keys: every route needs one, except those a probe must reach without secrets. Pure ASGI, so nothing is buffered."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.openai.errors import ApiError, unauthorized

OPEN_PATHS = frozenset({"/live", "/ready", "/health"})


class RequireKey:
    """Raises ApiError 401 unless the request carries `Authorization: Bearer KEY` with one of `keys`. Unknown paths too."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self.app = app
        self.keys = [key.encode() for key in keys]
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self.open_paths and (error := self._refusal(Headers(scope=scope))):
            raise error
        await self.app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        given = headers.get("authorization")
        if given is None:
            return unauthorized("No API key was given: send it in the header 'Authorization: Bearer KEY'.")
        scheme, _, key = given.partition(" ")
        # Headers are latin-1 on the wire; encoding back gives the client's very bytes. Every key is compared in full.
        sent = key.strip().encode("latin-1")
        matches = [hmac.compare_digest(sent, known) for known in self.keys]
        if scheme.lower() != "bearer" or not any(matches):
            return unauthorized("The API key is not valid.")
        return None
