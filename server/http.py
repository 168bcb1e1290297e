"""uvicorn, run from inside: one socket bound early, bounded headers, errors in OpenAI's shape, signals left to us."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.openai.errors import ApiError
from server.request_id import new_id

MAX_HEADER_BYTES = 64 << 10  # request line and headers; uvicorn itself takes any number
TOO_LARGE = (431, "headers_too_large", "The request headers are too large.")
HEADER_SECONDS = 30.0  # for them to arrive
LEFTOVER_SECONDS = 30.0  # for the rest of a body whose answer is out
MAX_PIPELINED = 16  # requests read ahead of the one that is being answered
KEEP_ALIVE_SECONDS = 75  # longer than the usual 60 of load balancers, so that it is they who close
CLOSE_SECONDS = 5  # for answers to be flushed after the engine is down


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; connections wait in its backlog until the app is there. Raises OSError with a clear message."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except socket.gaierror as error:
        raise OSError(f"--host {host}: {error.strerror}") from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except OSError as error:
        sock.close()
        raise OSError(f"cannot listen on {host} port {port}: {error.strerror}") from None
    sock.setblocking(False)
    return sock


def url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _UntilClosed(int):
    """The length of an HTTP/1.0 answer that announces none: it ends with the connection, so no length is wrong."""

    def __lt__(self, other: object) -> bool:
        return False

    def __ne__(self, other: object) -> bool:
        return False

    def __sub__(self, other: int) -> _UntilClosed:
        return self


class _Exit:
    """The transport as one answer knows it: to close it waits until the client has been heard out."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        self._protocol = protocol
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing

    def close(self) -> None:
        self._protocol.close_politely()


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with bounds on a request's head, and with patience.

    A head is bounded in bytes and time, trailers in bytes. Upgrades (`Upgrade: h2c`, which Java's client sends with every
    request) are ignored, as RFC 9110 section 7.8 wants of a server that has none. What is left of a body whose answer is out
    already (401, 413 ...) is read and dropped for LEFTOVER_SECONDS: to hang up on a client that is still sending resets the
    connection, and the answer is lost with it. A client that leaves ends all its requests, pipelined ones included.
    """

    _in_head = True  # between two requests, or in the head of one
    _in_body = False  # the head is complete, the body is not
    _muted = False  # the head that is being parsed is our own: see _go_on
    _leaving = False  # the connection ends with the body that is being read
    _head_bytes = 0  # of a head, then of the trailers
    _running: RequestResponseCycle | None = None  # the request that is being answered; `cycle` is the last that came
    _head_timer: asyncio.TimerHandle | None = None
    _leftover_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timers()
        for cycle in (self._running, *(queued for queued, _ in self.pipeline)):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if not (self._in_head or self._in_body) and self.cycle.response_complete:
            self._expect_head()  # of the next request: uvicorn's keep-alive time ends with the first byte
        if self._in_head:
            self._head_bytes += len(data)
        self._feed(data)
        if self._in_head and self._head_bytes > MAX_HEADER_BYTES:
            self.refuse(*TOO_LARGE)

    def _feed(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._go_on(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self.refuse(400, "invalid_http", "This is no valid HTTP request.")

    def _go_on(self, data: bytes) -> None:
        """Where the parser stops, behind a head that asks for an upgrade: a new one reads the body, `data` first."""
        framing = [b"%b: %b\r\n" % header for header in self.headers if header[0] in (b"content-length", b"transfer-encoding")]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._muted = True
        self._feed(b"POST / HTTP/1.1\r\n%b\r\n" % b"".join(framing or [b"content-length: 0\r\n"]))
        if data:
            self._feed(data)

    def on_message_begin(self) -> None:
        if self._muted:
            return
        super().on_message_begin()
        if not self._in_head:  # a further request on this connection
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        if not self._muted:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._muted:
            return
        if self._in_head:
            super().on_header(name, value)
            return
        self._head_bytes += len(name) + len(value)  # trailers, which nobody here reads
        if self._head_bytes > MAX_HEADER_BYTES:
            self.refuse(*TOO_LARGE)

    def on_headers_complete(self) -> None:
        if self._muted:
            self._muted = False
            return
        self._stop_timers()
        self._in_head, self._head_bytes = False, 0
        if self.transport.is_closing():
            return
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES:
            self.refuse(*TOO_LARGE)
            return
        super().on_headers_complete()
        self._in_body = True
        self.cycle.transport = _Exit(self)  # type: ignore[assignment]  # all of a transport that it uses
        if self.scope["http_version"] == "1.0":  # which knows no chunks
            self.cycle.chunked_encoding, self.cycle.expected_content_length = False, _UntilClosed()
        if len(self.pipeline) < MAX_PIPELINED:  # uvicorn stops reading at the first, and would not hear the client leave
            self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        if not self.transport.is_closing():
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.transport.is_closing() or self.parser.should_upgrade():
            return
        self._in_body = False
        super().on_message_complete()
        if self._leftover_timer is not None:
            self._stop_timers()
        if self._leaving:
            self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and self.cycle.response_complete:
            self._leftover_timer = self.loop.call_later(LEFTOVER_SECONDS, self._give_up)

    def close_politely(self) -> None:
        """Close now, or when the body whose answer is out has been read."""
        if self._in_body and self.cycle.response_complete and self.transport.can_write_eof():
            self._leaving = True
            self.transport.write_eof()
        else:
            self.transport.close()

    def refuse(self, status: int, code: str, message: str) -> None:
        """Answer for an app that was never called, where an answer has its place, and hang up."""
        if self.transport.is_closing():
            return
        if self._answers_next():
            body = ApiError(status, message, code=code).body()
            head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}x-request-id: {new_id()}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def _answers_next(self) -> bool:
        """Whether what is written next would be taken for the answer to what is being read."""
        running = self._running
        if running is None:
            return True
        return not running.response_started if self._in_body and running is self.cycle else running.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _expect_head(self) -> None:
        self._stop_timers()
        self._in_head, self._head_bytes = True, 0
        self._head_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_timers(self) -> None:
        for timer in (self._head_timer, self._leftover_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._leftover_timer = None

    def _give_up(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()


class HttpServer(uvicorn.Server):
    """Serves an app until `should_exit`. Signals are the caller's."""

    def __init__(self, app: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=BoundedProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=CLOSE_SECONDS,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
