"""/v1/completions: prompts of every kind, echo, logprobs as parallel lists."""

from __future__ import annotations

from typing import Any

import pytest

from server.openai import answer
from tests.server.conftest import Api, ApiFactory, events


def join(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """The choice that a stream's chunks add up to."""
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    lists = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    return {
        "text": "".join(part["text"] for part in parts),
        "finish_reason": parts[-1]["finish_reason"],
        "logprobs": {name: [entry for one in lists for entry in one[name]] for name in lists[0]} if lists else None,
    }


async def test_an_answer(api: Api) -> None:
    body = (await api.complete(max_tokens=3)).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "Hello there,", "logprobs": None, "finish_reason": "length"}]
    assert body["usage"]["completion_tokens"] == 3
    assert api.request().prompt_ids == api.tokenizer.encode("Once upon")


async def test_the_default_limit_is_openai_s(api: Api) -> None:
    await api.complete()
    assert api.request().params.max_tokens == 16
    await api.complete(prompt=[5] * 505)
    assert api.request().params.max_tokens == 7  # a default is cut to the room; a wish would be refused


async def test_a_stream_adds_up(api: Api) -> None:
    whole = (await api.complete(logprobs=2, echo=True)).json()["choices"][0]
    streamed = join(events(await api.complete(logprobs=2, echo=True, stream=True)))
    assert streamed == {name: whole[name] for name in streamed}
    usage = events(await api.complete(stream=True, stream_options={"include_usage": True}))[-1]["usage"]
    assert usage == (await api.complete()).json()["usage"]


async def test_prompts_of_every_kind(make_api: ApiFactory) -> None:
    api = make_api("done")
    ids = api.tokenizer.encode("Hi you")
    for prompt, count in [("Hi you", 1), (ids, 1), (["Hi you"], 1), ([ids], 1), (["Hi you", "Hi you"], 2), ([ids, ids, ids], 3)]:
        before = len(api.engine.requests)
        body = (await api.complete(prompt=prompt, n=2)).json()
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * count))
        assert {choice["text"] for choice in body["choices"]} == {"done"}
        assert [request.prompt_ids for request in api.engine.requests[before:]] == [ids] * count
        assert body["usage"]["prompt_tokens"] == len(ids) * count


async def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(make_api: ApiFactory) -> None:
    api = make_api("x")
    api.engine.script = lambda request, index: api.tokenizer.encode(f" {len(request.prompt_ids)}-{index}", False)[:16]
    prompts = ["a", "a b", "a b c"]
    body = (await api.complete(prompt=prompts, n=2)).json()
    wanted = [f" {size}-{index}" for size in (1, 2, 3) for index in (0, 1)]
    assert [choice["text"] for choice in body["choices"]] == wanted
    chunks = events(await api.complete(prompt=prompts, n=2, stream=True))
    assert [join(chunks, i)["text"] for i in range(6)] == wanted


async def test_equal_prompts_of_one_body_get_seeds_of_their_own(api: Api) -> None:
    await api.complete(prompt=["a", "a"])
    first, second = api.engine.requests
    assert first.params.seed != second.params.seed
    await api.complete(prompt=["a", "a"], seed=3)
    assert [request.params.seed for request in api.engine.requests[2:]] == [3, 3]


async def test_echo(api: Api) -> None:
    assert (await api.complete(echo=True)).json()["choices"][0]["text"] == "Once uponHello there, friend."
    ids = api.tokenizer.encode("Once upon")
    assert (await api.complete(prompt=ids, echo=True)).json()["choices"][0]["text"] == "Once uponHello there, friend."


async def test_logprobs(make_api: ApiFactory) -> None:
    api = make_api("é🙂 ok")
    choice = (await api.complete(logprobs=2)).json()["choices"][0]
    lists = choice["logprobs"]
    count = len(lists["tokens"])
    assert len(lists["token_logprobs"]) == len(lists["top_logprobs"]) == len(lists["text_offset"]) == count
    assert all(1 <= len(top) <= 3 for top in lists["top_logprobs"])
    assert all(token in top for token, top in zip(lists["tokens"], lists["top_logprobs"], strict=True))
    assert lists["text_offset"][-1] == len(choice["text"])  # EOS stands behind the text
    assert lists["tokens"][-2] == " ok"
    assert lists["text_offset"][-2] == choice["text"].index(" ok")
    assert all(len(top) == 1 for top in (await api.complete(logprobs=0)).json()["choices"][0]["logprobs"]["top_logprobs"])


async def test_echo_with_logprobs_scores_the_prompt(api: Api) -> None:
    choice = (await api.complete(prompt="Once upon a time", echo=True, logprobs=1, max_tokens=0)).json()["choices"][0]
    lists = choice["logprobs"]
    assert choice["text"] == "Once upon a time" == "".join(lists["tokens"])
    assert choice["finish_reason"] == "length"
    assert lists["token_logprobs"][0] == 0.0  # nothing comes before it
    assert lists["top_logprobs"][0] == {}
    assert all(logprob < 0 for logprob in lists["token_logprobs"][1:])
    assert lists["text_offset"] == [0, 4, 9, 11]
    assert api.request().params.max_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_offsets_count_the_special_tokens_that_a_prompt_spells_out(api: Api, stream: bool) -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>"
    response = await api.complete(prompt=prompt, echo=True, logprobs=0, max_tokens=2, stream=stream)
    choice = join(events(response)) if stream else response.json()["choices"][0]
    lists, text = choice["logprobs"], choice["text"]
    assert lists["tokens"][:2] == ["<|im_start|>", "user"]
    ends = [*lists["text_offset"][1:], len(text)]
    assert [text[start:end] for start, end in zip(lists["text_offset"], ends, strict=True)] == lists["tokens"]


async def test_a_body_of_many_logprobs_is_the_same_made_beside_the_event_loop(
    make_api: ApiFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies = []
    for most in (256, 0):
        monkeypatch.setattr(answer, "INLINE_TOKENS", most)
        body = (await make_api("one two three").complete(logprobs=3, echo=True, prompt_logprobs=2, seed=1)).json()
        bodies.append({name: body[name] for name in ("choices", "usage")})
    assert bodies[0] == bodies[1]


async def test_no_tokens_at_all(api: Api) -> None:
    body = (await api.complete(max_tokens=0)).json()
    assert body["choices"][0]["text"] == ""
    assert body["usage"]["completion_tokens"] == 0


async def test_prompt_logprobs_of_several_prompts(api: Api) -> None:
    body = (await api.complete(prompt=["a b", "a b c"], prompt_logprobs=1, return_token_ids=True)).json()
    for choice, request in zip(body["choices"], api.engine.requests, strict=True):
        assert choice["prompt_token_ids"] == request.prompt_ids
        assert len(choice["prompt_logprobs"]) == len(request.prompt_ids)
        assert choice["token_ids"][-1] == min(api.tokenizer.eos_ids)


async def test_a_prediction(make_api: ApiFactory) -> None:
    api = make_api("one two three four")
    prediction = {"type": "content", "content": "one two three five"}
    body = (await api.complete(prediction=prediction)).json()
    assert body["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 3
    await api.complete(prediction={"type": "content", "content": "word " * 10_000}, max_tokens=8)
    assert len(api.request().prediction_ids) == 8  # what the answer can have


async def test_stop_strings_of_one_prompt_end_it_in_the_engine(make_api: ApiFactory) -> None:
    api = make_api("x", eos=False)
    texts = {1: "halt now and nothing else", 2: "a long story that goes on and on"}
    api.engine.script = lambda request, index: api.tokenizer.encode(texts[len(request.prompt_ids)], False)
    body = (await api.complete(prompt=["a", "a b"], stop=[" now"], max_tokens=30)).json()
    assert [choice["text"] for choice in body["choices"]] == ["halt", "a long story that goes on and on"]
    assert api.engine.aborted == [api.engine.requests[0].request_id]


@pytest.mark.parametrize(
    ("best_of", "n", "status"), [(1, 1, 200), (2, 2, 200), (None, 3, 200), (2, 1, 400), (1, 2, 400), (0, 1, 400)]
)
async def test_best_of_only_where_it_changes_nothing(api: Api, best_of: int | None, n: int, status: int) -> None:
    response = await api.complete(best_of=best_of, n=n)
    assert response.status_code == status
    assert status == 200 or response.json()["error"]["param"] == "best_of"
