"""Every body and every chunk, strictly against the OpenAI SDK's types and the official OpenAPI document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import ValidationError

from tests.server.conftest import Api, ApiFactory, events
from tests.server.official import check, extras, validate_openapi

CHAT_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "samples": {"n": 2},
    "cut": {"max_tokens": 2},
    "stop": {"stop": "there"},
    "logprobs": {"logprobs": True},
    "top logprobs": {"logprobs": True, "top_logprobs": 5},
    "prediction": {"prediction": {"type": "content", "content": "Hello there, foe."}},
    "token ids": {"return_token_ids": True, "logprobs": True},
}
COMPLETION_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "samples": {"n": 2},
    "prompts": {"prompt": ["a", "b"]},
    "logprobs": {"logprobs": 3},
    "no alternatives": {"logprobs": 0},
    "echo": {"echo": True},
    "echo and logprobs": {"echo": True, "logprobs": 2},
    "scoring": {"echo": True, "logprobs": 1, "max_tokens": 0},
    "stop": {"stop": ["there"]},
    "token ids": {"return_token_ids": True},
}


@pytest.fixture(scope="module", params=["SDK", "OpenAPI"])
def openapi(request: pytest.FixtureRequest) -> dict[str, Any] | None:
    if request.param == "SDK":
        return None
    shared: Path = request.getfixturevalue("shared_data")
    return json.loads((shared / "openai_openapi_subset.json").read_text())


@pytest.mark.parametrize("fields", CHAT_CASES.values(), ids=CHAT_CASES.keys())
async def test_chat(api: Api, openapi: Any, fields: dict[str, Any]) -> None:
    check((await api.chat(**fields)).json(), ChatCompletion, openapi)
    chunks = events(await api.chat(**fields, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks:
        check(chunk, ChatCompletionChunk, openapi)
    for chunk in events(await api.chat(**fields, stream=True)):
        check(chunk, ChatCompletionChunk, openapi)


@pytest.mark.parametrize("fields", COMPLETION_CASES.values(), ids=COMPLETION_CASES.keys())
async def test_completions(make_api: ApiFactory, openapi: Any, fields: dict[str, Any]) -> None:
    api = make_api("Hello there, é🙂.")
    check((await api.complete(**fields)).json(), Completion, openapi)
    options = {"include_usage": True, "continuous_usage_stats": True}
    for chunk in events(await api.complete(**fields, stream=True, stream_options=options)):
        check(chunk, Completion, openapi)


async def test_models(api: Api, openapi: Any) -> None:
    for model in (await api.http.get("/v1/models")).json()["data"]:
        check(model, Model, openapi)


async def test_errors(api: Api, openapi: Any) -> None:
    if openapi is not None:
        for response in (await api.chat(n=0), await api.chat(model="x"), await api.http.get("/nothing"), await api.chat(x=1)):
            validate_openapi(response.json(), "ErrorResponse", openapi)


async def test_the_check_itself_can_fail(api: Api, openapi: Any) -> None:
    body = (await api.chat()).json()
    assert extras(ChatCompletion.model_validate({**body, "surprise": 1})) == [".surprise"]
    with pytest.raises(AssertionError):
        check({**body, "usage": {**body["usage"], "surprise": 1}}, ChatCompletion, openapi)
    with pytest.raises(ValidationError):
        check({**body, "created": "today"}, ChatCompletion, openapi)
