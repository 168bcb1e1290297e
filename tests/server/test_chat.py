"""/v1/chat/completions: what comes back, streaming or not."""

from __future__ import annotations

from typing import Any

from tests.server.conftest import Api, ApiFactory, error, events


def text_of(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(
        choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"] if choice["index"] == index
    )


async def test_an_answer(api: Api) -> None:
    body = (await api.chat()).json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "fake"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there, friend.", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    usage = body["usage"]
    assert usage["prompt_tokens"] == len(api.request().prompt_ids)
    assert usage["completion_tokens"] == len(api.tokenizer.encode("Hello there, friend.", False)) + 1  # EOS counts
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2


async def test_the_prompt_is_the_chat_template_s(api: Api) -> None:
    await api.chat(messages=[{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    prompt = api.tokenizer.decode(api.request().prompt_ids, skip_special_tokens=False)
    assert prompt == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


async def test_special_tokens_in_a_message_stay_text(api: Api) -> None:
    await api.chat(messages=[{"role": "user", "content": "<|im_end|>"}])
    ends = api.request().prompt_ids.count(api.tokenizer.encode("<|im_end|>", False)[0])
    await api.chat(messages=[{"role": "user", "content": "harmless"}])
    assert ends == api.request().prompt_ids.count(api.tokenizer.encode("<|im_end|>", False)[0])


async def test_text_parts_are_one_text(api: Api) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await api.chat(messages=[{"role": "user", "content": parts}])
    assert "user\none\ntwo<|im_end|>" in api.tokenizer.decode(api.request().prompt_ids, skip_special_tokens=False)


async def test_an_assistant_message_can_be_continued(api: Api) -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two,"}]
    await api.chat(messages=messages, continue_final_message=True)
    assert api.tokenizer.decode(api.request().prompt_ids, skip_special_tokens=False).endswith("assistant\nOne, two,")


async def test_an_sdk_answer_is_accepted_as_history(api: Api) -> None:
    answer = {
        "role": "assistant",
        "content": "Hi",
        "refusal": None,
        "tool_calls": None,
        "function_call": None,
        "annotations": None,
    }
    assert (await api.chat(messages=[{"role": "user", "content": "Hi"}, answer])).status_code == 200


async def test_a_stream(api: Api) -> None:
    response = await api.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers
    chunks = events(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert text_of(chunks) == "Hello there, friend."
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_in_a_stream(api: Api) -> None:
    whole = (await api.chat()).json()["usage"]
    chunks = events(await api.chat(stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole


async def test_usage_in_every_chunk(api: Api) -> None:
    chunks = events(await api.chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[1:]]
    assert counts == sorted(counts)
    assert counts[0] == 1


async def test_samples_have_their_own_texts(make_api: ApiFactory) -> None:
    api = make_api("first", "the second one", "third")
    body = (await api.chat(n=3)).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["first", "the second one", "third"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["prompt_tokens"] == len(api.request().prompt_ids)  # once, not three times
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2  # what sample 0 found, not what it left to the others
    chunks = events(await api.chat(n=3, stream=True))
    assert [text_of(chunks, i) for i in range(3)] == ["first", "the second one", "third"]
    roles = [choice["index"] for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
    assert sorted(roles) == [0, 1, 2]


async def test_the_limit_of_tokens(api: Api) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        body = (await api.chat(**{field: 2})).json()
        assert body["choices"][0]["finish_reason"] == "length"
        assert body["usage"]["completion_tokens"] == 2
    await api.chat()
    assert api.request().params.max_tokens == 512 - len(api.request().prompt_ids)


async def test_a_stop_string_ends_the_answer(make_api: ApiFactory) -> None:
    api = make_api("One two three four five", eos=False)
    body = (await api.chat(stop="three")).json()
    assert body["choices"][0]["message"]["content"] == "One two "
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 3
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 2  # known although the engine never finished
    assert api.engine.aborted == [api.request().request_id]
    body = (await api.chat(stop=["nowhere", "thr"], include_stop_str_in_output=True)).json()
    assert body["choices"][0]["message"]["content"] == "One two thr"


async def test_a_stop_string_of_one_sample_leaves_the_others_alone(make_api: ApiFactory) -> None:
    api = make_api("stop here and go on for long", "all of this is said until the end")
    body = (await api.chat(n=2, stop="here")).json()
    assert [choice["message"]["content"] for choice in body["choices"]] == ["stop ", "all of this is said until the end"]
    assert api.engine.aborted == []


async def test_a_stop_token_has_no_text(make_api: ApiFactory) -> None:
    api = make_api("One two three")
    (stop_id,) = api.tokenizer.encode(" two", False)
    body = (await api.chat(stop_token_ids=[stop_id])).json()
    assert body["choices"][0]["message"]["content"] == "One"
    assert body["choices"][0]["finish_reason"] == "stop"
    body = (await api.chat(stop_token_ids=[stop_id], include_stop_str_in_output=True)).json()
    assert body["choices"][0]["message"]["content"] == "One two"


async def test_special_tokens_are_shown_when_asked(make_api: ApiFactory) -> None:
    api = make_api("a<|im_start|>b")
    assert (await api.chat()).json()["choices"][0]["message"]["content"] == "ab"
    assert (await api.chat(skip_special_tokens=False)).json()["choices"][0]["message"]["content"] == "a<|im_start|>b"


async def test_logprobs(make_api: ApiFactory) -> None:
    api = make_api("Hé 🙂!")
    choice = (await api.chat(logprobs=True, top_logprobs=3)).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None
    spoken = b"".join(bytes(entry["bytes"]) for entry in content[:-1])
    assert spoken.decode() == choice["message"]["content"] == "Hé 🙂!"
    assert all(len(entry["top_logprobs"]) == 3 for entry in content)
    assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in content)
    chunks = events(await api.chat(logprobs=True, top_logprobs=3, stream=True))
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert streamed == content
    assert (await api.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_logprobs_come_with_their_text(make_api: ApiFactory) -> None:
    """A chunk's logprobs are those of the tokens whose text it shows, while a stop string holds text back, too."""
    api = make_api("One two three. One two four.")
    chunks = events(await api.chat(logprobs=True, stream=True, stop=" two three four"))[1:]
    shown = 0
    for chunk in chunks[:-1]:
        choice = chunk["choices"][0]
        spoken = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]).decode()
        assert spoken == choice["delta"]["content"]
        shown += 1
    assert shown > 3


async def test_a_prediction_is_a_draft(make_api: ApiFactory) -> None:
    api = make_api("def f(x): return x + 1")
    prediction = {"type": "content", "content": "def f(x): return x - 1"}
    body = (await api.chat(prediction=prediction)).json()
    details = body["usage"]["completion_tokens_details"]
    assert body["choices"][0]["message"]["content"] == "def f(x): return x + 1"
    assert api.request().prediction_ids == api.tokenizer.encode(prediction["content"], False)
    assert details["accepted_prediction_tokens"] > 3
    assert details["rejected_prediction_tokens"] == 1
    parts = {"type": "content", "content": [{"type": "text", "text": "def f(x): "}, {"type": "text", "text": "return x - 1"}]}
    assert (await api.chat(prediction=parts)).json()["usage"] == body["usage"]
    stopped = (await api.chat(prediction=prediction, stop="return")).json()["usage"]["completion_tokens_details"]
    assert stopped["accepted_prediction_tokens"] > 3
    api.engine.tokens_per_step = 100
    cut = (await api.chat(prediction=prediction, stop="f(")).json()["usage"]
    assert cut["completion_tokens_details"]["accepted_prediction_tokens"] <= cut["completion_tokens"]


async def test_prompt_logprobs_and_token_ids(api: Api) -> None:
    body = (await api.chat(prompt_logprobs=2, return_token_ids=True)).json()
    prompt_ids = api.request().prompt_ids
    assert body["prompt_token_ids"] == prompt_ids
    assert body["choices"][0]["token_ids"] == [*api.tokenizer.encode("Hello there, friend.", False), min(api.tokenizer.eos_ids)]
    entries = body["prompt_logprobs"]
    assert entries[0] is None
    assert len(entries) == len(prompt_ids)
    for token_id, entry in zip(prompt_ids[1:], entries[1:], strict=True):
        assert entry[str(token_id)]["rank"] == 1
        assert entry[str(token_id)]["decoded_token"] == api.tokenizer.token_text(token_id)
        assert len(entry) == 2
    chunks = events(await api.chat(return_token_ids=True, stream=True))
    assert chunks[0]["prompt_token_ids"] == prompt_ids
    streamed = [token for chunk in chunks for token in chunk["choices"][0].get("token_ids", [])]
    assert streamed == body["choices"][0]["token_ids"]
    error(await api.chat(prompt_logprobs=1, stream=True), 400, "invalid_value", "prompt_logprobs")


async def test_parameters_reach_the_engine(api: Api) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"17": -100, "4": 2.5},
        "allowed_token_ids": [3, 1, 2],
        "min_tokens": 2,
        "max_tokens": 7,
        "stop_token_ids": [9],
        "ignore_eos": True,
        "seed": 42,
        "logprobs": True,
        "top_logprobs": 4,
        "prompt_logprobs": 1,
    }
    await api.chat(**fields, priority=-3, cache_salt="tenant", n=2)
    request, params = api.request(), api.request().params
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        assert getattr(params, name) == fields[name]
    assert params.logit_bias == {17: -100.0, 4: 2.5}
    assert params.allowed_token_ids == [1, 2, 3]
    assert (params.min_tokens, params.max_tokens, params.stop_token_ids, params.ignore_eos) == (2, 7, [9], True)
    assert (params.seed, params.logprobs, params.prompt_logprobs) == (42, 4, 1)
    assert (request.priority, request.cache_salt, request.n) == (-3, "tenant", 2)


async def test_defaults(api: Api) -> None:
    await api.chat(temperature=None, top_p=None, n=None, stop=None, seed=None, logit_bias=None, stream=None)
    params = api.request().params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    first = params.seed
    await api.chat()
    assert api.request().params.seed != first
    assert 0 <= first < 1 << 63


async def test_values_at_the_edge_are_honoured(api: Api) -> None:
    await api.chat(seed=-1, temperature=1e-45, top_p=0, top_k=-1)
    params = api.request().params
    assert params.seed == (1 << 64) - 1
    assert params.temperature == 0.0
    assert 0 < params.top_p < 1e-5
    assert params.top_k == 0
    await api.chat(top_k=10**9, temperature=-0.0)
    assert api.request().params.top_k == 0
    assert api.request().params.temperature == 0.0


async def test_bad_words_are_banned_with_and_without_a_space(api: Api) -> None:
    await api.chat(bad_words=["cat", " New York"])
    encode = api.tokenizer.encode
    wanted = [encode(text, False) for text in ("cat", " cat", "New York", " New York")]
    assert api.request().params.bad_words == wanted


async def test_what_changes_nothing_is_accepted(api: Api) -> None:
    response = await api.chat(
        store=True,
        metadata={"a": "b"},
        user="me",
        service_tier="auto",
        response_format={"type": "text"},
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        modalities=["text"],
        safety_identifier="x",
        prompt_cache_key="k",
        audio=None,
        prediction=None,
    )
    assert response.status_code == 200, response.text


async def test_the_servers_seed_draws_the_missing_ones(make_api: ApiFactory) -> None:
    """Two servers started with one --seed draw the same seeds in the same order; a request's own seed is untouched."""
    drawn = []
    for server_seed in (5, 5, 6):
        api = make_api(seed=server_seed)
        seeds = []
        for own in (None, 42, None):
            await api.chat(seed=own)
            seeds.append(api.request().params.seed)
        assert seeds[1] == 42 and seeds[0] != seeds[2]
        drawn.append(seeds)
    assert drawn[0] == drawn[1] != drawn[2]
