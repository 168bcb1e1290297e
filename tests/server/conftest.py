"""The HTTP API over a scripted engine, in this process and without a socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.request import Request
from server.app import create_app
from server.config import ServerConfig
from server.tokenizer import Tokenizer
from tests.server.fakes import FakeEngineClient, Script

MODEL = "fake"


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir: Path) -> Tokenizer:
    return Tokenizer.load(smollm2_dir)


def says(tokenizer: Tokenizer, *texts: str, eos: bool = True) -> Script:
    """Sample i of every request says texts[i]; the last text serves all further samples."""
    end = [min(tokenizer.eos_ids)] if eos else []

    def script(request: Request, index: int) -> list[int]:
        return tokenizer.encode(texts[min(index, len(texts) - 1)], False) + end

    return script


@dataclass
class Api:
    """One app, its scripted engine, and an HTTP client for it."""

    app: FastAPI
    engine: FakeEngineClient
    http: httpx.AsyncClient
    tokenizer: Tokenizer

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], **fields}
        return await self.post("/v1/chat/completions", body)

    async def complete(self, **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", {"model": MODEL, "prompt": "Once upon", **fields})

    def request(self) -> Request:
        """What the engine was asked last."""
        return self.engine.requests[-1]


ApiFactory = Callable[..., Api]


@pytest.fixture
async def make_api(tokenizer: Tokenizer) -> AsyncIterator[ApiFactory]:
    """make_api("text", ..., tokens_per_step=1, **settings): the engine's samples say these texts, then EOS."""
    opened = []

    def make(*texts: str, tokens_per_step: int = 1, eos: bool = True, **settings: Any) -> Api:
        engine = FakeEngineClient(
            says(tokenizer, *(texts or ("Hello there, friend.",)), eos=eos), tokenizer.eos_ids, tokens_per_step
        )
        app = create_app(ServerConfig(served_model_name=MODEL, **settings), engine, tokenizer)  # type: ignore[arg-type]
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url="http://test")
        opened.append(http)
        return Api(app, engine, http, tokenizer)

    yield make
    for http in opened:
        await http.aclose()


@pytest.fixture
def api(make_api: ApiFactory) -> Api:
    return make_api()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream; the stream must end with [DONE]."""
    assert response.status_code == 200, response.text
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def error(response: httpx.Response, status: int, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The error of a response, which must be of OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    if code is not None:
        assert body["error"]["code"] == code, body
    if param is not None:
        assert body["error"]["param"] == param, body
    return body["error"]
