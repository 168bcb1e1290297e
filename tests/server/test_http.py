"""The HTTP server below the app, over raw sockets: bounded headers, errors in OpenAI's shape, hanging up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
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


@pytest.fixture
async def port() -> AsyncIterator[int]:
    with bind("127.0.0.1", 0) as sock:
        server = HttpServer(app)
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        yield sock.getsockname()[1]
        server.should_exit = True
        await serving


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
