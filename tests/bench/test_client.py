"""The streaming client against bytes as servers send them, and against a small live server."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from bench.client import Endpoint, Exchange, events, read_head
from bench.load import Ask, parse, run
from bench.prompts import Prompt

PROMPT = Prompt("p", "open", [{"role": "user", "content": "hello"}])


def stream(*events: object, done: bool = True) -> list[bytes]:
    """A chunked response with one chunk per event."""
    texts = [f"data: {json.dumps(event)}\n\n" for event in events] + ["data: [DONE]\n\n"] * done
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return [head, *(f"{len(text.encode()):x}\r\n{text}\r\n".encode() for text in texts), b"0\r\n\r\n"]


def delta(text: str | None = None, finish: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "delta": {"content": text} if text is not None else {}, "finish_reason": finish}]}


def usage(tokens: int) -> dict[str, object]:
    return {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}


def exchange(parts: list[bytes]) -> Exchange:
    """Part i arrives at second i + 1."""
    return Exchange(0.0, [(float(i), part) for i, part in enumerate(parts, start=1)])


def test_tokens_come_from_usage_and_times_from_text() -> None:
    answer = parse(PROMPT, exchange(stream(delta(""), delta("one two"), delta(" three"), delta(finish="stop"), usage(9))))
    assert answer.error is None
    assert (answer.text, answer.tokens, answer.prompt_tokens, answer.finish_reason) == ("one two three", 9, 7, "stop")
    assert answer.times == [3.0, 4.0]  # the head was part 1, the empty delta part 2
    assert answer.end == 5.0
    assert answer.counted


def test_without_usage_events_are_counted_and_the_answer_says_so() -> None:
    answer = parse(PROMPT, exchange(stream(delta("a"), delta("b"), delta(finish="length"))))
    assert (answer.tokens, answer.counted) == (2, False)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 10_000])
def test_packets_may_be_cut_anywhere(size: int) -> None:
    data = b"".join(stream(delta("é"), delta("ü"), delta(finish="stop"), usage(2)))
    packets = [data[i : i + size] for i in range(0, len(data), size)]
    answer = parse(PROMPT, exchange(packets))
    assert (answer.error, answer.text, answer.tokens) == (None, "éü", 2)
    assert answer.times == sorted(answer.times)


def test_an_event_arrives_with_its_last_byte() -> None:
    packets = [(1.0, b"data: a"), (2.0, b"b\n"), (3.0, b"\ndata: c\r\n\r\n: comment\n\n")]
    assert list(events(packets)) == [(3.0, "ab"), (3.0, "c")]


def test_a_body_without_chunks_is_read_to_its_end() -> None:
    status, headers, body = read_head([(1.0, b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n{"), (2.0, b"}\n\n")])
    assert (status, headers["content-length"], b"".join(data for _, data in body)) == (200, "4", b"{}\n\n")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([b"HTTP/1.1 429 Too Many\r\nContent-Length: 9\r\n\r\nslow down"], "status 429: slow down"),
        ([b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}"], "status 200: {}"),
        ([b"nonsense"], "not understood"),
        ([], "not understood"),
        (stream(delta("a"), done=False), "ended early"),
        (stream(delta("a"), {"error": {"message": "engine died"}}), "engine died"),
    ],
)
def test_a_failed_answer_says_why(parts: list[bytes], said: str) -> None:
    error = parse(PROMPT, exchange(parts)).error
    assert error is not None
    assert said in error


class Server:
    """Answers every request with the same stream, and remembers how many it held at once and what was asked."""

    def __init__(self, hold: int) -> None:
        self.hold = hold  # answers only once so many requests are in flight, or all have come
        self.bodies: list[dict[str, object]] = []
        self.open = self.most = 0
        self.full = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        self.bodies.append(json.loads(await reader.readexactly(length)))
        self.open += 1
        self.most = max(self.most, self.open)
        if self.open >= self.hold:
            self.full.set()
        await self.full.wait()
        writer.writelines(stream(delta("x"), delta("y"), delta(finish="length"), usage(2)))
        await writer.drain()
        self.open -= 1
        writer.close()


async def ask(server: Server, count: int, concurrency: int, rate: float | None = None, **fields: object) -> object:
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    async with listener:
        endpoint = Endpoint(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1", "key")
        question = Ask("m", **fields)  # type: ignore[arg-type]  # whatever the test asks for
        return await run(endpoint, question, [PROMPT] * count, concurrency=concurrency, rate=rate, seed=0, limit=10.0)


async def test_a_closed_loop_keeps_its_concurrency() -> None:
    server = Server(hold=3)
    done = await ask(server, 7, concurrency=3)
    assert [answer.text for answer in done.answers] == ["xy"] * 7
    assert server.most == 3
    assert done.wall > 0


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    server = Server(hold=6)  # would never answer a closed loop of fewer than six
    done = await ask(server, 6, concurrency=1, rate=500.0)
    assert [answer.error for answer in done.answers] == [None] * 6
    assert server.most == 6


async def test_what_is_asked() -> None:
    server = Server(hold=1)
    await ask(server, 2, concurrency=1, max_tokens=5, ignore_eos=True, extra={"cache_salt": "s-{unique}", "top_k": 3})
    first, second = server.bodies
    assert first["messages"] == PROMPT.messages
    assert (first["max_tokens"], first["ignore_eos"], first["top_k"], first["stream"]) == (5, True, 3, True)
    assert str(first["cache_salt"]).startswith("s-")
    assert first["cache_salt"] != second["cache_salt"]


async def test_a_server_that_is_not_there_is_an_error_not_an_exception() -> None:
    done = await run(Endpoint("http://127.0.0.1:9/v1"), Ask("m"), [PROMPT], concurrency=1, rate=None, seed=0, limit=5.0)
    assert done.answers[0].error is not None
    assert "no connection" in done.answers[0].error


async def test_a_silent_server_is_given_up() -> None:
    server = Server(hold=2)
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    async with listener:
        endpoint = Endpoint(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1")
        exchange = await endpoint.send(endpoint.request("POST", "/x", b"{}"), time.monotonic(), 0.05)
        server.full.set()
    assert exchange.error == "no answer within 0.05 s"
