"""Server-sent events: a response that is written as it comes to be, and work that ends when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.openai.errors import ApiError, internal, timed_out

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
Result = TypeVar("Result")


class ClientGone(Exception):
    """The client closed the connection before it had its answer."""


def event(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


_LINE_ENDS = ((b"\xe2\x80\xa8", rb"\u2028"), (b"\xe2\x80\xa9", rb"\u2029"), (b"\xc2\x85", rb"\u0085"))


def quote(text: str) -> bytes:
    """`text` as a JSON string that stays on one line even for clients that split at Unicode's line ends."""
    data = msgspec.json.encode(text)
    if not text.isascii():
        for raw, escaped in _LINE_ENDS:
            data = data.replace(raw, escaped)
    return data


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result], seconds: float | None = None) -> Result:
    """The result of `work`, which is cancelled at once when the client goes away (ClientGone) or time is up (504)."""
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait({task, watch}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watch.done():
            watch.result()  # raises if the server's receive() failed
            raise ClientGone
        assert seconds is not None
        raise timed_out(seconds)
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events` as they come.

    Nothing is sent before the first event, so that what fails before it has its own status code; what fails later
    becomes an event `data: {"error": ...}` and the end, and `on_failure` hears of it. `on_close` runs whatever happens.
    """

    media_type = "text/event-stream"
    last_words_seconds = 5.0  # a client that does not read must not hold its slot

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        headers: Mapping[str, str] | None = None,
        *,
        seconds: float | None = None,
        on_close: Callable[[], None] = lambda: None,
        on_failure: Callable[[Exception], None] = lambda failure: None,
    ) -> None:
        own = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers={**own, **(headers or {})}, media_type=self.media_type)
        del self.headers["content-length"]
        self.events = events
        self.seconds = seconds
        self.on_close = on_close
        self.on_failure = on_failure
        self.started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send), self.seconds)
        except (ApiError, ClientGone) as failure:
            if not self.started:
                raise
            self.on_failure(failure)
            if isinstance(failure, ApiError):
                await self._last_words(failure, send)
        finally:
            self.on_close()

    async def _send(self, send: Send) -> None:
        try:
            async with aclosing(self.events) as events:
                async for data in events:
                    if not self.started:
                        await self._start(send)
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (ApiError, ClientGone):
            raise
        except OSError:  # how a server may say that the client is gone
            raise ClientGone from None
        except Exception:
            log.exception("a stream failed")
            raise internal() from None

    async def _start(self, send: Send) -> None:
        self.started = True
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

    async def _last_words(self, error: ApiError, send: Send) -> None:
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(self.last_words_seconds):
                await send({"type": "http.response.body", "body": event(error.body()), "more_body": False})
