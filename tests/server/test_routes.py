"""Models, version, tokenize, detokenize, health."""

from __future__ import annotations

import json
import threading
from typing import Any

import jsonschema
import pytest

from server.openai import tokenize
from tests.server.conftest import Api, ApiFactory, error


async def test_models(api: Api) -> None:
    body = (await api.http.get("/v1/models")).json()
    (model,) = body["data"]
    assert body["object"] == "list"
    assert model == {
        "id": "fake",
        "object": "model",
        "created": model["created"],
        "owned_by": "outrider",
        "max_model_len": 512,
    }
    assert (await api.http.get("/v1/models/fake")).json() == model


async def test_a_model_s_name_may_hold_a_slash(make_api: ApiFactory) -> None:
    api = make_api()
    api.app.state.frontend.model = "org/name"
    assert (await api.http.get("/v1/models/org/name")).json()["id"] == "org/name"
    assert (await api.http.get("/v1/models/org%2Fname")).json()["id"] == "org/name"


async def test_version(api: Api) -> None:
    assert set((await api.http.get("/version")).json()) == {"version"}


async def test_tokenize_a_text(api: Api) -> None:
    body = (await api.post("/tokenize", {"model": "fake", "prompt": "Hello there"})).json()
    ids = api.tokenizer.encode("Hello there")
    assert body == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    body = (await api.post("/tokenize", {"prompt": "Hello there", "return_token_strs": True})).json()
    assert body["token_strs"] == ["Hello", " there"]
    long = (await api.post("/tokenize", {"prompt": "word " * 2000})).json()  # counting is not limited by the context
    assert long["count"] > 2000
    assert (await api.post("/tokenize", {"prompt": ""})).json()["tokens"] == []


async def test_tokenize_messages(api: Api) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = (await api.post("/tokenize", {"messages": messages})).json()
    await api.chat(messages=messages)
    assert body["tokens"] == api.request().prompt_ids
    shorter = (await api.post("/tokenize", {"messages": messages, "add_generation_prompt": False})).json()
    assert shorter["count"] < body["count"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "extra": 1}, "extra"),
        ({"messages": []}, "messages"),
        ({"prompt": "x", "continue_final_message": True}, "continue_final_message"),
        ({"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}, "add_special_tokens"),
    ],
)
async def test_bad_tokenize(api: Api, body: dict[str, Any], param: str) -> None:
    error(await api.post("/tokenize", body), 400, param=param)


async def test_detokenize_undoes_tokenize(api: Api) -> None:
    for text in ("Hello there", "Naïve 🙂 café", "<|im_start|>user"):
        ids = (await api.post("/tokenize", {"prompt": text})).json()["tokens"]
        assert (await api.post("/detokenize", {"model": "fake", "tokens": ids})).json() == {"prompt": text}
    assert (await api.post("/detokenize", {"tokens": []})).json() == {"prompt": ""}


@pytest.mark.parametrize("tokens", [None, "x", 5, [-1], [49152], [2**63], [10**400], ["1"], [1.5], [True], [None], [[1]], {}])
async def test_bad_detokenize(api: Api, tokens: Any) -> None:
    response = await api.http.post(
        "/detokenize", content=json.dumps({"tokens": tokens}), headers={"content-type": "application/json"}
    )
    error(response, 400, param="tokens")


async def test_health(api: Api) -> None:
    async def statuses() -> list[int]:
        return [(await api.http.get(path)).status_code for path in ("/live", "/ready", "/health")]

    assert await statuses() == [200, 200, 200]
    api.engine.ready = False  # starting, or starting again
    assert await statuses() == [200, 503, 503]
    api.engine.live = False  # gone for good
    assert await statuses() == [503, 503, 503]
    api.engine.ready = api.engine.live = True
    api.app.state.frontend.admission.drain()
    assert await statuses() == [200, 503, 200]
    for path in ("/live", "/ready", "/health"):
        assert (await api.http.post(path)).status_code == 405
    assert api.engine.requests == []  # a probe never makes work


async def test_the_openapi_document_describes_every_route_and_body(api: Api) -> None:
    document = (await api.http.get("/openapi.json")).json()
    paths, schemas = document["paths"], document["components"]["schemas"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/tokenize", "/detokenize", "/metrics"} <= set(paths)
    assert all("default" in operation["responses"] for path in paths.values() for operation in path.values())
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    good: list[tuple[str, dict[str, Any]]] = [
        ("ChatRequest", {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "stop": "x", "logit_bias": {"5": 1}}),
        (
            "ChatRequest",
            {"model": "fake", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "stop": ["x"]},
        ),
        *(("CompletionRequest", {"model": "fake", "prompt": prompt}) for prompt in ("a", ["a"], [1], [[1], [2]])),
    ]
    for name, value in good:
        schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
        jsonschema.Draft202012Validator(schema).validate(value)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate({**value, "n": 0})
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate({**value, "surprise": 0})


async def test_tokenize_and_detokenize_take_only_so_much_at_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for counting, so a context's length is no limit; but a body of 15 MB would cost gigabytes and a minute."""
    monkeypatch.setattr(tokenize, "TOKENIZER_CHARS", 5000)
    monkeypatch.setattr(tokenize, "TOKENIZER_IDS", 5000)
    text = "word " * 1000
    ids = (await api.post("/tokenize", {"prompt": text})).json()["tokens"]
    error(await api.post("/tokenize", {"prompt": text + "!"}), 400, "invalid_value", "prompt")
    messages = [{"role": "user", "content": text}, {"role": "user", "content": "!"}]
    error(await api.post("/tokenize", {"messages": messages}), 400, "invalid_value", "messages")
    assert (await api.post("/detokenize", {"tokens": ids})).json() == {"prompt": text}
    error(await api.post("/detokenize", {"tokens": ids * 5}), 400, "invalid_value", "tokens")


async def test_much_text_is_tokenized_beside_the_event_loop(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    named = type(api.tokenizer).token_text
    monkeypatch.setattr(
        type(api.tokenizer), "token_text", lambda self, i: threads.append(threading.current_thread()) or named(self, i)
    )
    for count in (10, 10_000):
        threads.clear()
        body = {"prompt": "word " * count, "return_token_strs": True}
        assert len((await api.post("/tokenize", body)).json()["token_strs"]) == count + 1
        assert {thread is threading.main_thread() for thread in threads} == {count == 10}


async def test_tokenize_counts_as_a_request(make_api: ApiFactory) -> None:
    api = make_api(max_queue=1)
    with api.app.state.frontend.admission.slot():
        error(await api.post("/tokenize", {"prompt": "a"}), 429, "server_overloaded")
        error(await api.post("/detokenize", {"tokens": [1]}), 429, "server_overloaded")
    assert (await api.post("/tokenize", {"prompt": "a"})).status_code == 200
    assert api.app.state.frontend.admission.in_flight == 0


@pytest.mark.parametrize("path", ["/live", "/ready", "/health"])
async def test_probes_may_ask_for_the_head_alone(make_api: ApiFactory, path: str) -> None:
    api = make_api(api_key=["secret"])
    response = await api.http.head(path)
    assert response.status_code == 200
    api.app.state.frontend.admission.drain()
    assert (await api.http.head(path)).status_code == (503 if path == "/ready" else 200)
