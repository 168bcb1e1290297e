"""The gate: what clients reach. It reads a request, has Ray Serve choose a replica by the prompt, and streams the answer.

Whether a request is right, allowed or known, the replica says. A replica that is lost before its answer has begun costs a client
nothing but time: the same request gives the same tokens elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from server.openai.errors import RETRY_SOON, ApiError, body_too_large, unavailable
from server.openai.sse import event
from server.replicas.ask import Ask, Head, routing_text

logger = logging.getLogger("outrider.gate")

TRIES = 3  # replicas that a request is offered to


class Gate:
    """Ray Serve's deployment. `replicas`: a handle of server/replicas/replica.py."""

    def __init__(self, replicas: Any, max_body_bytes: int) -> None:
        self._answer = replicas.options(method_name="answer", stream=True)
        self._max_body_bytes = max_body_bytes

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._forward(await self._read(request))
        except ApiError as error:
            return error.response()

    async def _read(self, request: Request) -> Ask:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise body_too_large(self._max_body_bytes)
        url = request.url
        path = f"{url.path}?{url.query}" if url.query else url.path
        return Ask(request.method, path, request.headers.items(), bytes(body), routing_text(bytes(body)))

    async def _forward(self, ask: Ask) -> Response:
        for _ in range(TRIES):
            answer = self._answer.remote(ask)
            try:
                head: Head = await anext(answer)
            except BackPressureError:
                raise _full() from None
            except RayError as error:
                logger.warning("a replica was lost before it answered: %s", str(error).splitlines()[0])
                continue
            response = StreamingResponse(_body(answer, head), head.status)
            response.raw_headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in head.headers]
            return response
        raise unavailable(f"{TRIES} replicas were lost one after the other before they answered.", "replica_lost")


async def _body(answer: Any, head: Head) -> AsyncGenerator[bytes, None]:
    chunks: AsyncIterator[bytes] = answer
    try:
        async for chunk in chunks:
            yield chunk
    except RayError:
        if not dict(head.headers).get("Content-Type", dict(head.headers).get("content-type", "")).startswith("text/event-stream"):
            raise  # the connection is cut: half an answer must not look like a whole one
        yield event(unavailable("The replica that worked on this request was lost.", "replica_lost").body())
    finally:
        answer.cancel()  # nobody reads any further; of a finished one nothing is left to cancel


def _full() -> ApiError:
    message = "All replicas have as many requests as they take, and so has the queue. Try again soon."
    return ApiError(429, message, kind="rate_limit_error", code="server_overloaded", headers={"Retry-After": RETRY_SOON})
