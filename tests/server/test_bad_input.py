"""Bad bodies: each is answered with 400 naming the field, or honoured; the engine never sees one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from server.openai.schema import CompletionRequest
from tests.server.conftest import MODEL, Api, error

HUGE = 10**400
VOCAB = 49152
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION: dict[str, Any] = {"model": MODEL, "prompt": "Hi"}
ROUTES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION}

NUMBERS = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "n",
    "seed",
    "max_tokens",
    "min_tokens",
    "prompt_logprobs",
    "logprobs",
    "top_logprobs",
    "priority",
    "best_of",
]
ID_LISTS = ("stop_token_ids", "allowed_token_ids")
# Python's json writes NaN and Infinity as such, which is what a careless client sends.
NO_NUMBERS: list[Any] = [float("nan"), float("inf"), -float("inf"), HUGE, -HUGE, 1e308, "1", [], {}, [1], True]
NO_IDS: list[Any] = [-1, 2**31, 2**63, VOCAB, 2**64, HUGE, float("nan"), 1.5, 1.0, "1", None, [], [1], True, {}]


async def send(api: Api, path: str, body: dict[str, Any]) -> Any:
    return await api.http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


async def refused(api: Api, path: str, field: str, value: Any, param: str | None = None) -> None:
    response = await send(api, path, {**ROUTES[path], field: value})
    named = error(response, 400)["param"]
    assert named is not None, response.text
    assert named.split("[")[0].split(".")[0] == (param or field), response.text
    assert api.engine.requests == []


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("field", NUMBERS)
async def test_no_number(api: Api, path: str, field: str) -> None:
    for value in NO_NUMBERS:
        if field == "logprobs" and value is True and path.endswith("chat/completions"):
            continue  # there it is a switch
        await refused(api, path, field, value)


@pytest.mark.parametrize("field", NUMBERS)
async def test_extreme_numbers_are_honoured_or_refused_by_name(api: Api, field: str) -> None:
    for path in ROUTES:
        for value in (0, -0.0, -1, 1e-45, 2**31, 2**63, -(2**63), None):
            response = await send(api, path, {**ROUTES[path], field: value})
            assert response.status_code in (200, 400), response.text
            if response.status_code == 400:
                assert field in error(response, 400)["param"]


@pytest.mark.parametrize("field", ID_LISTS)
async def test_no_token_id(api: Api, field: str) -> None:
    for value in NO_IDS:
        await refused(api, "/v1/chat/completions", field, [5, value])
    for value in ("5", 5, {}, True, [[]]):
        await refused(api, "/v1/completions", field, value)


async def test_the_last_token_id_is_one(api: Api) -> None:
    for field in ID_LISTS:
        assert (await api.chat(**{field: [VOCAB - 1]})).status_code == 200
    assert (await api.complete(prompt=[VOCAB - 1])).status_code == 200
    assert (await api.chat(logit_bias={str(VOCAB - 1): 1})).status_code == 200
    api.engine.info.vocab_size = 100  # type: ignore[union-attr]  # a model with fewer rows than its tokenizer has names
    error(await api.complete(prompt=[100]), 400, "invalid_value", "prompt")


@pytest.mark.parametrize(
    "key", ["-1", str(VOCAB), str(2**31), str(2**63), str(HUGE), "NaN", "1.5", "", " 5", "05", "+5", "x", "\u0665"]
)
async def test_no_key_of_logit_bias(api: Api, key: str) -> None:
    await refused(api, "/v1/chat/completions", "logit_bias", {key: 1})


@pytest.mark.parametrize("bias", [101, -100.5, float("nan"), float("inf"), HUGE, "1", None, True, [], {}])
async def test_no_bias(api: Api, bias: Any) -> None:
    await refused(api, "/v1/completions", "logit_bias", {"5": bias})


@pytest.mark.parametrize(
    "prompt",
    [None, "", [], [""], [[]], ["a", ""], [[1], []], ["a", 1], [1, "a"], [1, [1]], [[1], "a"], 5, True, {}, 1.5, [[[1]]], [None]]
    + [[value] for value in NO_IDS if not isinstance(value, (str, list))]
    + [[[1, value]] for value in NO_IDS],
    ids=repr,
)
async def test_no_prompt(api: Api, prompt: Any) -> None:
    await refused(api, "/v1/completions", "prompt", prompt)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("Hi", "messages"),
        ({}, "messages"),
        ([None], "messages[0]"),
        ([{}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0]"),
        ([{"role": "tool", "content": "Hi", "tool_call_id": "1"}], "messages[0].role"),
        ([{"role": "wizard", "content": "Hi"}], "messages[0].role"),
        ([{"role": "user", "content": "Hi", "mood": "good"}], "messages[0].mood"),
        (
            [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x", "tool_calls": [{}]}],
            "messages[1].tool_calls",
        ),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}], "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
        ([{"role": "user", "content": "Hi"}] * 5000, "messages"),
    ],
)
async def test_no_messages(api: Api, messages: Any, param: str) -> None:
    response = await send(api, "/v1/chat/completions", {**CHAT, "messages": messages})
    assert error(response, 400)["param"] == param
    assert api.engine.requests == []


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "stop": ["", [""], ["a", ""], ["x"] * 17, "x" * 1025, 5, [5], [None], {}, True],
        "bad_words": ["x", [""], [" "], [5], ["x"] * 257, ["x" * 257], {}],
        "n": [0, 129, 1.0, 5_000_000],
        "stop_token_ids": [[1] * 257],
        "allowed_token_ids": [[]],
        "logit_bias": [[], "x", {str(i): 1 for i in range(1025)}],
        "stream": ["true", 1, "yes"],
        "stream_options": [{}, {"include_usage": True}, 5],
        "ignore_eos": [1, "true"],
        "cache_salt": ["", "x" * 129, 5],
        "user": [5, ["x"]],
        "prediction": ["text", {"type": "content"}, {"type": "x", "content": "a"}, {"type": "content", "content": 5}],
        "temperature": [-0.1, 2.1],
        "top_p": [-0.1, 1.1],
        "min_p": [-0.1, 1.1],
        "top_k": [-2],
        "repetition_penalty": [0, -1, 11],
        "presence_penalty": [-2.1, 2.1],
        "frequency_penalty": [-2.1, 2.1],
        "min_tokens": [-1, 100_000],
        "max_tokens": [-1, 100_000],
        "prompt_logprobs": [-1, 21],
        "return_token_ids": ["x"],
        "priority": [1.5, "high"],
    }.items(),
)
async def test_out_of_bounds(api: Api, field: str, values: list[Any]) -> None:
    for path in ROUTES:
        for value in values:
            await refused(api, path, field, value)


@pytest.mark.parametrize(
    ("field", "value"),
    {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "tool_choice": "required",
        "functions": [{"name": "f"}],
        "function_call": {"name": "f"},
        "response_format": {"type": "json_object"},
        "modalities": ["text", "audio"],
        "audio": {"voice": "alloy", "format": "wav"},
        "reasoning_effort": "high",
        "verbosity": "low",
        "web_search_options": {},
        "service_tier": "flex",
        "moderation": {"model": "x"},
        "top_logprobs": 3,  # without logprobs
        "max_completion_tokens": 0,
        "best_of": 1,
        "echo": True,
        "guided_json": {},
        "stream_options": {"include_usage": True},
        "temprature": 0.5,
    }.items(),
)
async def test_what_cannot_be_honoured_is_refused_by_name(api: Api, field: str, value: Any) -> None:
    await refused(api, "/v1/chat/completions", field, value)


@pytest.mark.parametrize(("field", "value"), [("suffix", "the end"), ("best_of", 3), ("messages", []), ("use_beam_search", True)])
async def test_completions_refuse_by_name_too(api: Api, field: str, value: Any) -> None:
    await refused(api, "/v1/completions", field, value)


async def test_fields_that_contradict_each_other(api: Api) -> None:
    error(await api.chat(max_tokens=5, max_completion_tokens=6), 400, param="max_tokens")
    error(await api.chat(min_tokens=6, max_tokens=5), 400, param="min_tokens")
    error(await api.chat(add_generation_prompt=True, continue_final_message=True), 400, param="continue_final_message")
    error(
        await api.chat(stream=True, stream_options={"include_obfuscation": True}), 400, param="stream_options.include_obfuscation"
    )
    error(await api.complete(prompt=["a"] * 257), 400, param="prompt")
    error(await api.complete(prompt=["a"] * 100, n=100), 400, param="n")
    assert api.engine.requests == []


async def test_too_long_for_the_context(api: Api) -> None:
    limit = 512
    long = error(await api.complete(prompt=[5] * limit), 400, "context_length_exceeded", "prompt")
    assert str(limit) in long["message"]
    error(await api.complete(prompt="x" * 1_000_000), 400, "context_length_exceeded", "prompt")
    error(await api.complete(prompt=["short", "word " * 600]), 400, "context_length_exceeded", "prompt")
    wished = error(await api.complete(prompt=[5] * 500, max_tokens=13), 400, "context_length_exceeded", "max_tokens")
    assert all(number in wished["message"] for number in ("512", "513", "500", "13"))
    assert (await api.complete(prompt=[5] * 500, max_tokens=12)).status_code == 200
    messages = [{"role": "user", "content": "word " * 600}]
    error(await api.chat(messages=messages), 400, "context_length_exceeded", "messages")
    error(await api.chat(messages=[{"role": "user", "content": "x" * 5_000_000}]), 400, "context_length_exceeded", "messages")
    error(await api.chat(max_completion_tokens=512), 400, "context_length_exceeded", "max_completion_tokens")


async def test_logprobs_are_capped_by_what_they_cost(api: Api) -> None:
    api.engine.info.max_model_len = 100_000  # type: ignore[union-attr]
    error(await api.chat(n=128, logprobs=True, top_logprobs=20), 400, param="top_logprobs")
    error(await api.complete(prompt=[[5] * 90_000] * 2, prompt_logprobs=20), 400, param="prompt_logprobs")
    assert (await api.chat(n=128, logprobs=True, top_logprobs=20, max_tokens=10)).status_code == 200


def raw_bodies() -> dict[str, bytes]:
    head = b'{"model": "fake", "prompt": '
    return {
        "nothing": b"",
        "null": b"null",
        "a list": b"[]",
        "a string": b'"Hi"',
        "half": b'{"model": "fake"',
        "deep lists": b"[" * 100_000,
        "deep prompt": head + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "deep objects": b'{"a":' * 100_000,
        "many keys": b"{" + b",".join(b'"k%d":1' % i for i in range(100_000)) + b"}",
        "a lone surrogate": head + b'"\\ud800"}',
        "NaN": head + b'"Hi", "temperature": NaN}',
        "1e999": head + b'"Hi", "temperature": 1e999}',
        "a number of 5000 digits": head + b'"Hi", "n": ' + b"1" * 5000 + b"}",
        "a byte order mark": b"\xef\xbb\xbf" + head + b'"Hi"}',
        "UTF-16": (head + b'"Hi"}').decode().encode("utf-16"),
        "not UTF-8": head + b'"\xff\xfe"}',
        "single quotes": b"{'model': 'fake', 'prompt': 'Hi'}",
        "text behind it": head + b'"Hi"} x',
    }


def test_unknown_fields_are_not_all_listed() -> None:
    """Listing them is what would make a large bad body dear."""
    with pytest.raises(ValidationError) as caught:
        CompletionRequest.model_validate_json(raw_bodies()["many keys"])
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("body", raw_bodies().values(), ids=raw_bodies().keys())
async def test_no_json(api: Api, body: bytes) -> None:
    response = await api.http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error(response, 400)
    assert api.engine.requests == []


async def test_an_error_repeats_nothing_large(api: Api) -> None:
    name = "x" * 100_000
    for response in (
        await api.chat(**{name: 1}),
        await api.chat(model=name),
        await api.chat(stop=[name]),
        await api.http.get(name[:9999]),
    ):
        assert len(response.content) < 1000


async def test_what_a_content_may_be_is_said(api: Api) -> None:
    for content in (None, 5, {}):
        said = error(await api.chat(messages=[{"role": "assistant", "content": content}]), 400, "invalid_type")
        assert "a text or a list of text parts" in said["message"]


async def test_nul_and_odd_text_are_text(api: Api) -> None:
    for text in ("\x00", "\u2028\u0085", "🙂" * 50, "\ufeff", "{{ 7*7 }}{% raw %}", "‮abc"):
        response = await api.chat(messages=[{"role": "user", "content": text}])
        assert response.status_code == 200, response.text
        assert text in api.tokenizer.decode(api.request().prompt_ids, skip_special_tokens=False)
