"""Calls from browsers: allowed from the origins the operator named, and from nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from server.openai.errors import invalid


class Cors(CORSMiddleware):
    """Keys travel in a header, never in cookies, so credentials stay off."""

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After", "X-Outrider-Lossless"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refusal = invalid(bytes(response.body).decode(), None, "cors_refused").response()
        refusal.headers["Vary"] = "Origin"
        return refusal
