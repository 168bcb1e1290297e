"""The HTTP server below the app, over raw sockets: bounded headers, errors in OpenAI's shape, hanging up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server import http
from server.http import HttpServer, bind


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body it got."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", str(len(body)).encode())]})
    await send({"type": "http.response.body", "body": body})


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    with bind("127.0.0.1", 0) as sock:
        server = HttpServer(app)
        task = asyncio.create_task(server.serve(sockets=[sock]))
        yield sock.getsockname()[1]
        server.should_exit = True
        await task


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with serving(app) as port:
        yield port


async def exchange(port: int, *chunks: bytes) -> bytes:
    """Everything the server says until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for chunk in chunks:
            writer.write(chunk)
            await writer.drain()
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def error(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, body = answer.split(b"\r\n\r\n", 1)
    return int(head.split()[1]), json.loads(body)["error"]


CLOSE = b"connection: close\r\n"


async def test_a_request_is_served(port: int) -> None:
    answer = await exchange(port, b"POST / HTTP/1.1\r\nhost: x\r\n", CLOSE, b"content-length: 3\r\n\r\n", b"abc")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"abc")
    assert b"server:" not in answer.lower()


async def test_two_requests_on_one_connection(port: int) -> None:
    one = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n1"
    answer = await exchange(port, one, one.replace(b"\r\n\r\n1", b"\r\n" + CLOSE + b"\r\n2"))
    assert answer.count(b"HTTP/1.1 200") == 2
    assert answer.endswith(b"2")


@pytest.mark.parametrize(
    "garbage", [b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"\x16\x03\x01\x02\x00"]
)
async def test_garbage_gets_an_error_of_the_usual_shape(port: int, garbage: bytes) -> None:
    status, said = error(await exchange(port, garbage))
    assert status == 400
    assert set(said) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "chunks",
    [
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000,),
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",),
        (b"GET / HTTP/1.1\r\n", *(b"x%d: y\r\n" % i for i in range(20_000))),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",),
    ],
)
async def test_headers_without_end_are_refused(port: int, chunks: tuple[bytes, ...]) -> None:
    try:
        answer = await exchange(port, *chunks)
    except ConnectionError:  # it hung up while we were still talking
        return
    if answer:  # else the reset overtook it
        status, said = error(answer)
        assert status == 431
        assert said["type"] == "invalid_request_error"


async def test_large_bodies_are_not_the_headers_business(port: int) -> None:
    body = b"b" * 300_000
    answer = await exchange(port, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 300000\r\n" + CLOSE + b"\r\n" + body)
    assert answer.endswith(body)


async def test_headers_that_never_end_are_hung_up_on(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEADER_SECONDS", 0.1)
    assert await exchange(port, b"GET / HTTP/1.1\r\nx: ") == b""
    assert await exchange(port) == b""


async def test_a_slow_body_is_not_cut_off_by_the_time_for_headers(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEADER_SECONDS", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n" + CLOSE + b"\r\na")
    await writer.drain()
    assert await exchange(port) == b""  # a silent connection: 0.1 s have passed
    writer.write(b"b")
    assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"ab")
    writer.close()


async def test_a_kept_connection_cannot_be_held_with_blank_lines(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "HEADER_SECONDS", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\na")
    assert (await reader.readuntil(b"\r\n\r\na")).startswith(b"HTTP/1.1 200")
    writer.write(b"\r\n")
    assert await asyncio.wait_for(reader.read(), 10) == b""
    writer.close()


async def refusing(scope: Any, receive: Any, send: Any) -> None:
    """Answers 401 without reading the body."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"no"})


async def streaming(scope: Any, receive: Any, send: Any) -> None:
    """Two pieces, of a length nobody announced."""
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one,", "more_body": True})
        await send({"type": "http.response.body", "body": b"two", "more_body": False})


class Waiting:
    """Answers only to say that the client has left. `begun` and `left` say what came."""

    def __init__(self) -> None:
        self.begun, self.left = asyncio.Event(), asyncio.Event()
        self.paths: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.paths.append(scope["path"])
        self.begun.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left.set()


UPGRADE = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"


@pytest.mark.parametrize(
    "framing", [b"content-length: 5\r\n\r\nhello", b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"]
)
@pytest.mark.parametrize("pause", [False, True])
async def test_a_wish_for_another_protocol_is_ignored(port: int, framing: bytes, pause: bool) -> None:
    """Java's HttpClient asks for h2c with every first request; so does `curl --http2`."""
    head, body = framing.split(b"\r\n\r\n", 1)
    first = [b"POST /a HTTP/1.1\r\nhost: x\r\n" + UPGRADE + head + b"\r\n\r\n", body]
    second = b"POST /b HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"content-length: 2\r\n\r\n22"
    answer = await exchange(port, *(first if pause else [b"".join(first)]), second)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert b"\r\n\r\nhelloHTTP/1.1 200" in answer
    assert answer.endswith(b"22")


async def test_an_upgrade_without_a_body_is_a_request_like_any_other(port: int) -> None:
    get = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n"
    answer = await exchange(port, get + get, b"GET / HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"\r\n")
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.count(b"HTTP/1.1") == 3


@pytest.mark.parametrize("pieces", [1, 20])
async def test_a_body_that_nobody_wants_does_not_cost_the_answer(pieces: int) -> None:
    """Two megabytes behind a 401: the client gets the 401, and its connection is good for the next request."""
    body = b"b" * 2_000_000
    size = len(body) // pieces
    async with serving(refusing) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
            for i in range(pieces):
                writer.write(body[i * size : (i + 1) * size])
                await writer.drain()
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\nno"), 10)
            assert answer.startswith(b"HTTP/1.1 401")
            assert answer.count(b"HTTP/1.1") == 1
        writer.close()


async def test_a_client_that_wants_to_close_is_heard_out_too() -> None:
    body = b"b" * 2_000_000
    async with serving(refusing) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"content-length: %d\r\n\r\n" % len(body))
        answer = await asyncio.wait_for(reader.read(), 10)  # to the end of what the server says
        assert answer.startswith(b"HTTP/1.1 401")
        assert answer.endswith(b"no")
        writer.write(body)
        await writer.drain()  # raises if the connection was reset
        writer.close()


async def test_a_body_that_nobody_wants_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "LEFTOVER_SECONDS", 0.1)
    async with serving(refusing) as port:
        answer = await exchange(port, b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nb")
        assert answer.endswith(b"no")  # and then it hung up, or this would still wait


async def test_trailers_are_bounded_like_headers(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n1\r\nb\r\n0\r\n"
    trailers = b"".join(b"x%d: %b\r\n" % (i, b"y" * 80) for i in range(2_000))
    try:
        answer = await exchange(port, head, trailers, trailers)
    except ConnectionError:
        return
    if answer:
        status, said = error(answer)
        assert (status, said["code"]) == (431, "headers_too_large")


async def test_few_trailers_change_nothing(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"transfer-encoding: chunked\r\n\r\n1\r\nb\r\n0\r\n"
    answer = await exchange(port, head, b"expires: never\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n\r\nb")


@pytest.mark.parametrize("more", [b"", b"GET /later HTTP/1.1\r\nhost: x\r\n\r\n", b"GET /later HTTP/1.1\r\nhost: x\r\n\r\n" * 3])
async def test_a_client_that_leaves_is_noticed_whatever_it_has_asked_for_behind(more: bytes) -> None:
    waiting = Waiting()
    async with serving(waiting) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /first HTTP/1.1\r\nhost: x\r\n\r\n" + more)
        await asyncio.wait_for(waiting.begun.wait(), 10)
        writer.close()
        await asyncio.wait_for(waiting.left.wait(), 10)
    assert waiting.paths == ["/first"]  # what waited behind it was never begun


async def test_garbage_behind_a_request_is_not_its_answer() -> None:
    waiting = Waiting()
    async with serving(waiting) as port:
        assert await exchange(port, b"GET /first HTTP/1.1\r\nhost: x\r\n\r\n", b"GARBAGE\r\n\r\n") == b""
        await asyncio.wait_for(waiting.left.wait(), 10)


async def test_http_1_0_gets_no_chunks() -> None:
    async with serving(streaming) as port:
        answer = await exchange(port, b"GET / HTTP/1.0\r\nhost: x\r\n\r\n")
        assert answer.endswith(b"\r\n\r\none,two")
        assert b"transfer-encoding" not in answer.lower()
        answer = await exchange(port, b"GET / HTTP/1.1\r\nhost: x\r\n" + CLOSE + b"\r\n")
        assert answer.endswith(b"4\r\none,\r\n3\r\ntwo\r\n0\r\n\r\n")


async def test_every_refusal_has_a_request_id(port: int) -> None:
    head, _ = (await exchange(port, b"GARBAGE\r\n\r\n")).split(b"\r\n\r\n", 1)
    assert b"x-request-id: req_" in head
