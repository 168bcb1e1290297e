"""A client that goes away is noticed at once, streaming or not, and its work in the engine ends."""

from __future__ import annotations

import asyncio
import json

import pytest

from server.openai.sse import EventStream
from tests.server.asgi import Connection
from tests.server.conftest import MODEL, Api, ApiFactory

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
BODIES = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": MODEL, "prompt": ["one", "two", "three"], "n": 2},
}


@pytest.fixture
def gated(make_api: ApiFactory) -> Api:
    """An engine that steps only when released."""
    api = make_api("a long story " * 30)
    api.engine.gate = asyncio.Semaphore(0)
    return api


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
async def test_a_disconnect_aborts(gated: Api, path: str, stream: bool, steps: int) -> None:
    engine = gated.engine
    assert engine.gate is not None
    connection = Connection(gated.app, path, {**BODIES[path], "stream": stream})
    call = asyncio.create_task(connection.call())
    count = 3 if "prompt" in BODIES[path] else 1
    await engine.until(lambda: engine.num_inflight == count)
    for _ in range(steps * count):
        engine.gate.release()
    if steps:
        await engine.until(lambda: sum(engine.steps.values()) == steps * count)
    connection.hang_up()
    await asyncio.wait_for(call, 20)
    assert sorted(engine.aborted) == sorted(request.request_id for request in engine.requests)
    assert engine.num_inflight == 0
    assert gated.app.state.frontend.admission.in_flight == 0
    metrics = gated.app.state.frontend.metrics
    assert metrics.disconnects == 1
    assert metrics.finished["abort"] == count * BODIES[path].get("n", 1)  # type: ignore[operator]


async def test_a_disconnect_after_the_end_is_nothing(api: Api) -> None:
    connection = Connection(api.app, "/v1/chat/completions", CHAT)
    await connection.call()
    connection.hang_up()
    assert connection.status == 200
    assert api.engine.aborted == []
    assert api.app.state.frontend.metrics.disconnects == 0


async def test_a_client_that_leaves_while_it_sends(api: Api) -> None:
    connection = Connection(api.app, "/v1/chat/completions", CHAT)
    connection.incoming.get_nowait()
    connection.incoming.put_nowait({"type": "http.request", "body": b'{"model"', "more_body": True})
    connection.hang_up()
    await connection.call()
    assert api.engine.requests == []
    assert api.app.state.frontend.metrics.disconnects == 1


async def test_a_stream_flows_token_by_token(gated: Api) -> None:
    """Each step's text leaves before the next step is made: nothing on the way collects it."""
    engine = gated.engine
    assert engine.gate is not None
    connection = Connection(gated.app, "/v1/chat/completions", {**CHAT, "stream": True})
    call = asyncio.create_task(connection.call())
    for _ in range(3):
        connection.sent.clear()
        before = len(connection.body)
        engine.gate.release()
        await asyncio.wait_for(connection.sent.wait(), 20)
        while b'"content":"' not in connection.body[before:]:
            connection.sent.clear()
            await asyncio.wait_for(connection.sent.wait(), 20)
    connection.hang_up()
    await asyncio.wait_for(call, 20)


async def test_time_runs_out(make_api: ApiFactory) -> None:
    api = make_api("a long story", request_timeout=0.05)
    api.engine.gate = asyncio.Semaphore(0)
    waiting = Connection(api.app, "/v1/chat/completions", CHAT)
    await asyncio.wait_for(waiting.call(), 20)
    assert waiting.status == 504
    assert json.loads(waiting.body)["error"]["code"] == "request_timeout"
    api.engine.gate.release()
    running = Connection(api.app, "/v1/chat/completions", {**CHAT, "stream": True})
    await asyncio.wait_for(running.call(), 20)
    assert running.status == 200
    last = running.body.decode().strip().rsplit("\n\n", 1)[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert len(api.engine.aborted) == 2
    assert api.app.state.frontend.admission.in_flight == 0


async def test_a_reader_that_reads_nothing_frees_its_slot() -> None:
    """The last words of a failed stream must not wait for ever for a client that has stopped reading."""
    closed = []

    async def events():  # type: ignore[no-untyped-def]
        yield b"data: {}\n\n"
        await asyncio.Event().wait()

    async def send(message: object) -> None:
        if isinstance(message, dict) and not message.get("more_body", True):
            await asyncio.Event().wait()

    response = EventStream(events(), seconds=0.01, on_close=lambda: closed.append(True))
    response.last_words_seconds = 0.01
    await asyncio.wait_for(response({}, asyncio.Queue().get, send), 20)  # type: ignore[arg-type]
    assert closed == [True]
