"""Every error of every route has OpenAI's shape, whoever raised it."""

from __future__ import annotations

import asyncio
import json
import logging

import pytest

from tests.server.asgi import Connection
from tests.server.conftest import MODEL, Api, ApiFactory, error

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
JSON = {"content-type": "application/json"}


def last_event(text: str) -> dict[str, object]:
    return json.loads(text.strip().rsplit("\n\n", 1)[-1].removeprefix("data: "))


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/nothing", "/v1/models/", "/docs", "/v1/chat/completions/"])
async def test_no_such_route(api: Api, path: str) -> None:
    error(await api.http.get(path), 404)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_wrong_method(api: Api, path: str, method: str) -> None:
    response = await api.http.request(method, path)
    error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


async def test_no_such_model(api: Api) -> None:
    error(await api.chat(model="gpt-4o"), 404, "model_not_found", "model")
    error(await api.complete(model=""), 404, "model_not_found", "model")
    error(await api.http.get("/v1/models/gpt-4o"), 404, "model_not_found", "model")
    error(await api.post("/tokenize", {"model": "gpt-4o", "prompt": "x"}), 404, "model_not_found", "model")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
async def test_wrong_content(api: Api, path: str) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        error(await api.http.post(path, content=b"{}", headers={"content-type": kind}), 415, "unsupported_media_type")
    error(await api.http.post(path, content=b"{}", headers={**JSON, "content-encoding": "gzip"}), 415)
    error(await api.http.post(path, content=b"{}", headers={"content-type": "application/json; charset=utf-8"}), 400)


async def test_too_large(make_api: ApiFactory) -> None:
    api = make_api(max_body_bytes=1024)
    error(await api.complete(prompt="x" * 1024), 413, "request_too_large")

    async def chunked():  # type: ignore[no-untyped-def]
        for _ in range(10):
            yield b" " * 200

    error(await api.http.post("/v1/completions", content=chunked(), headers=JSON), 413, "request_too_large")
    connection = Connection(api.app, "/v1/completions", b"{}", {"content-length": "9" * 30})
    await connection.call()
    assert connection.status == 413
    connection = Connection(api.app, "/v1/completions", b"{}", {"content-length": "-5"})
    await connection.call()
    assert connection.status == 400


async def test_too_many(make_api: ApiFactory) -> None:
    api = make_api("a story", max_queue=2)
    api.engine.gate = asyncio.Semaphore(0)
    running = [asyncio.create_task(api.chat(stream=stream)) for stream in (True, False)]
    await api.engine.until(lambda: api.engine.num_inflight == 2)
    response = await api.chat()
    assert error(response, 429, "server_overloaded")["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "1"
    for _ in range(100):
        api.engine.gate.release()
    assert [task.status_code for task in await asyncio.gather(*running)] == [200, 200]
    api.engine.gate = None
    assert (await api.chat()).status_code == 200
    with api.app.state.frontend.admission.slot():
        error(await api.complete(prompt=["a", "b"]), 429, "server_overloaded")  # each prompt is one
    error(await api.complete(prompt=["a", "b", "c"]), 400, "invalid_value", "prompt")  # to come back later would not help
    assert api.app.state.frontend.admission.in_flight == 0


async def test_a_refused_body_frees_its_slot(make_api: ApiFactory) -> None:
    api = make_api(max_queue=1)
    for _ in range(3):
        error(await api.complete(prompt=[10**9]), 400)
    assert (await api.complete()).status_code == 200


async def test_draining(api: Api) -> None:
    api.app.state.frontend.admission.drain()
    response = await api.chat()
    error(response, 503, "server_draining")
    assert int(response.headers["retry-after"]) > 0


async def test_no_engine_yet(api: Api) -> None:
    api.engine.ready = False
    for request in (api.chat(), api.complete(stream=True), api.post("/tokenize", {"prompt": "x"})):
        response = await request
        error(response, 503, "engine_unavailable")
        assert int(response.headers["retry-after"]) > 0
    api.engine.info = None
    error(await api.chat(), 503, "engine_unavailable")
    assert (await api.http.get("/v1/models")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engine_dies_before_the_first_token(api: Api, stream: bool) -> None:
    api.engine.die_after = 0
    response = await api.chat(stream=stream)
    error(response, 503, "engine_unavailable")
    assert int(response.headers["retry-after"]) > 0


async def test_the_engine_dies_later(api: Api) -> None:
    api.engine.die_after = 2
    error(await api.chat(), 503, "engine_unavailable")
    response = await api.chat(stream=True)
    assert response.status_code == 200
    assert "[DONE]" not in response.text
    body = last_event(response.text)
    assert set(body["error"]) == {"message", "type", "param", "code"}  # type: ignore[call-overload]
    assert body["error"]["code"] == "engine_unavailable"  # type: ignore[index]
    metrics = api.app.state.frontend.metrics
    assert metrics.finished["error"] == 2
    assert metrics.rejected["503", "engine_unavailable"] == 2


async def test_the_engine_fails_on_one_request(api: Api) -> None:
    api.engine.fail_after = 1
    assert error(await api.chat(), 500, "engine_error")["message"] == "the logits held NaN"
    response = await api.chat(stream=True)
    assert last_event(response.text)["error"]["code"] == "engine_error"  # type: ignore[index]
    error(await api.chat(n=2), 500, "engine_error")
    error(await api.complete(prompt=["a", "b"]), 500, "engine_error")
    assert api.engine.num_inflight == 0


async def test_a_request_that_leaves_nothing_to_say_is_told_that_it_is_wrong(api: Api) -> None:
    api.engine.fail_after, api.engine.fails_invalid = 1, True
    assert error(await api.chat(), 400, "invalid_value")["message"] == "no token is left"
    response = await api.chat(stream=True)
    assert last_event(response.text)["error"]["code"] == "invalid_value"  # type: ignore[index]
    error(await api.complete(prompt=["a", "b"]), 400, "invalid_value")
    assert api.engine.num_inflight == 0


async def test_a_bug_is_a_500_that_tells_nothing(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError("secret detail")

    api.engine.script = bug  # type: ignore[assignment]
    for stream in (False, True):
        with caplog.at_level(logging.ERROR):
            response = await api.chat(stream=stream)
        assert "secret" not in error(response, 500, "internal_error")["message"]
        assert "secret detail" in caplog.text
        caplog.clear()


async def test_request_ids(api: Api) -> None:
    for response in (await api.chat(), await api.chat(stream=True), await api.http.get("/nothing"), await api.chat(n=0)):
        assert response.headers["x-request-id"].startswith("req_")
    assert (await api.chat(user=None)).headers["x-request-id"] != (await api.chat()).headers["x-request-id"]
    given = await api.http.get("/health", headers={"x-request-id": "trace-42"})
    assert given.headers["x-request-id"] == "trace-42"
    for bad in ("x" * 129, "a b", "<script>", "é"):
        response = await api.http.get("/health", headers={"x-request-id": bad.encode()})  # type: ignore[dict-item]
        assert response.headers["x-request-id"].startswith("req_")


async def test_browsers_are_let_in_only_from_named_origins(make_api: ApiFactory) -> None:
    preflight = {"origin": "https://app.example", "access-control-request-method": "POST"}
    closed = await make_api().http.options("/v1/chat/completions", headers=preflight)
    assert closed.status_code == 405
    assert "access-control-allow-origin" not in closed.headers
    api = make_api(cors_allow_origins=["https://app.example"], api_key=["k"])
    allowed = await api.http.options("/v1/chat/completions", headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    foreign = await api.http.options("/v1/chat/completions", headers={**preflight, "origin": "https://evil.example"})
    error(foreign, 400, "cors_refused")
    refused = await api.http.get("/v1/models", headers={"origin": "https://app.example"})
    error(refused, 401)  # and the page can read why
    assert refused.headers["access-control-allow-origin"] == "https://app.example"
