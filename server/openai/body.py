"""From a request's bytes to a validated model: size, content type and JSON are checked here, before anything else runs."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from server.openai.errors import ApiError, body_too_large, from_validation, invalid, unsupported_media
from server.openai.sse import ClientGone

BODY_SECONDS = 60.0  # a body that trickles in slower than this is given up

Body = TypeVar("Body", bound=BaseModel)


async def read(request: Request, model: type[Body], limit: int) -> Body:
    """The body as `model`. Raises ApiError 400, 408, 413 or 415."""
    _check_headers(request, limit)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            body = await _bytes(request, limit)
    except TimeoutError:
        raise ApiError(408, "The request body did not arrive in time.", code="request_timeout") from None
    except ClientDisconnect:
        raise ClientGone from None
    return parse(model, body)


def parse(model: type[Body], body: bytes) -> Body:
    """Strict: no number from a string or a boolean, no unknown field, no NaN, depth at most 200 (jiter's limit).

    Of a name that an object has twice the last counts, as in every JSON parser.
    """
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error) from None


def _check_headers(request: Request, limit: int) -> None:
    headers = request.headers
    kind = headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise unsupported_media("The Content-Type must be application/json.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise unsupported_media("Compressed request bodies are not supported.")
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise invalid("The Content-Length is no number.", None, "invalid_header")
    if int(length[:20]) > limit:
        raise body_too_large(limit)


async def _bytes(request: Request, limit: int) -> bytes:
    chunks = bytearray()
    async for chunk in request.stream():
        chunks += chunk
        if len(chunks) > limit:  # a chunked body announces no length
            raise body_too_large(limit)
    return bytes(chunks)
