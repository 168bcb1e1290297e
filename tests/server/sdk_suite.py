"""What the official SDK must be able to do with a server, whatever runs behind it. Inherited by the tests that have one.

A subclass provides the fixtures `base_url`, `model` and `api_key`. Nothing here knows what the model says.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.server.official import check

MESSAGES: list[Any] = [{"role": "user", "content": "Write one sentence about the sea."}]


def raw(value: Any) -> dict[str, Any]:
    return value.model_dump(exclude_unset=True, mode="json")


class SdkSuite:
    @pytest.fixture
    async def sdk(self, base_url: str, api_key: str) -> Any:
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key=api_key, max_retries=0, timeout=120) as client:
            yield client

    async def test_models(self, sdk: AsyncOpenAI, model: str) -> None:
        models = (await sdk.models.list()).data
        assert [one.id for one in models] == [model]
        check(raw(models[0]), Model)
        assert (await sdk.models.retrieve(model)).id == model

    async def test_chat(self, sdk: AsyncOpenAI, model: str) -> None:
        answer = await sdk.chat.completions.create(model=model, messages=MESSAGES, max_tokens=12, seed=1)
        check(raw(answer), ChatCompletion)
        assert answer.choices[0].message.content
        assert answer.choices[0].message.role == "assistant"
        assert answer.usage is not None
        assert 1 <= answer.usage.completion_tokens <= 12
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer._request_id

    async def test_the_blocking_client(self, base_url: str, api_key: str, model: str) -> None:
        def ask() -> str:
            with OpenAI(base_url=f"{base_url}/v1", api_key=api_key, max_retries=0) as client:
                answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4)
                with client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4, stream=True) as stream:
                    return answer.choices[0].finish_reason + str(sum(1 for _ in stream) > 1)

        assert await asyncio.to_thread(ask) in ("lengthTrue", "stopTrue")

    async def test_a_stream_says_what_the_body_says(self, sdk: AsyncOpenAI, model: str) -> None:
        options: Any = {"model": model, "messages": MESSAGES, "max_completion_tokens": 16, "seed": 7, "temperature": 0.8}
        whole = await sdk.chat.completions.create(**options)
        stream = await sdk.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        for chunk in chunks:
            check(raw(chunk), ChatCompletionChunk)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens

    async def test_the_stream_helper(self, sdk: AsyncOpenAI, model: str) -> None:
        options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 64, "seed": 1, "logprobs": True, "stop": [" "]}
        async with sdk.chat.completions.stream(**options) as stream:
            async for _ in stream:
                pass
            final = await stream.get_final_completion()
        assert final.choices[0].finish_reason == "stop"
        assert final.choices[0].logprobs is not None

    async def test_its_answers_go_back_as_history(self, sdk: AsyncOpenAI, model: str) -> None:
        """However a client came by them: the SDK's own message objects carry fields that nobody wrote."""
        options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 40, "stop": [" ", "."]}  # `parse` wants a "stop"
        plain = (await sdk.chat.completions.create(**options)).choices[0].message
        parsed = (await sdk.chat.completions.parse(**options)).choices[0].message
        async with sdk.chat.completions.stream(**options) as stream:
            streamed = (await stream.get_final_completion()).choices[0].message
        for message in (plain, parsed, streamed):
            history: Any = [*MESSAGES, message.model_dump(), *MESSAGES]
            answer = await sdk.chat.completions.create(model=model, messages=history, max_tokens=2)
            assert answer.usage is not None
            assert answer.usage.completion_tokens

    async def test_samples(self, sdk: AsyncOpenAI, model: str) -> None:
        options: Any = {"model": model, "messages": MESSAGES, "n": 3, "max_tokens": 8, "seed": 3, "temperature": 1.5}
        answer = await sdk.chat.completions.create(**options)
        check(raw(answer), ChatCompletion)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        texts = [""] * 3
        async for chunk in await sdk.chat.completions.create(**options, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [choice.message.content for choice in answer.choices]

    async def test_a_seed_fixes_the_answer(self, sdk: AsyncOpenAI, model: str) -> None:
        options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 12, "temperature": 1.3}
        one, same = [(await sdk.chat.completions.create(**options, seed=5)).choices[0].message.content for _ in range(2)]
        assert one == same
        together = await asyncio.gather(*(sdk.chat.completions.create(**options, seed=5) for _ in range(4)))
        assert {answer.choices[0].message.content for answer in together} == {one}

    async def test_logprobs(self, sdk: AsyncOpenAI, model: str) -> None:
        answer = await sdk.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=4, temperature=0
        )
        check(raw(answer), ChatCompletion)
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        assert answer.usage is not None
        assert len(logprobs.content) == answer.usage.completion_tokens
        for entry in logprobs.content:
            assert entry.logprob <= 0
            assert len(entry.top_logprobs) == 4
            ranked = [top.logprob for top in entry.top_logprobs]
            assert ranked == sorted(ranked, reverse=True)
            assert entry.logprob == ranked[0]  # greedy
            assert entry.token == entry.top_logprobs[0].token

    async def test_a_stop_string(self, sdk: AsyncOpenAI, model: str) -> None:
        options: Any = {"model": model, "messages": MESSAGES, "seed": 11, "max_tokens": 24}
        text = (await sdk.chat.completions.create(**options)).choices[0].message.content
        assert text is not None
        assert len(text) > 8
        stop = text[4:8]  # wherever tokens begin and end
        answer = await sdk.chat.completions.create(**options, stop=[stop, "never said"])
        assert answer.choices[0].message.content == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        streamed = ""
        async for chunk in await sdk.chat.completions.create(**options, stop=stop, stream=True):
            streamed += chunk.choices[0].delta.content or ""
        assert streamed == text[: text.index(stop)]

    async def test_a_prediction_changes_nothing_but_the_work(self, sdk: AsyncOpenAI, model: str) -> None:
        options: Any = {"model": model, "messages": MESSAGES, "seed": 2, "max_tokens": 24}
        plain = await sdk.chat.completions.create(**options)
        text = plain.choices[0].message.content
        predicted = await sdk.chat.completions.create(**options, prediction={"type": "content", "content": text})
        assert predicted.choices[0].message.content == text
        assert predicted.usage is not None
        details = predicted.usage.completion_tokens_details
        assert details is not None
        assert details.accepted_prediction_tokens is not None
        assert details.accepted_prediction_tokens > 0
        assert plain.usage is not None
        assert predicted.usage.completion_tokens == plain.usage.completion_tokens
        wrong = await sdk.chat.completions.create(**options, prediction={"type": "content", "content": "Something else. " * 4})
        assert wrong.choices[0].message.content == text

    async def test_completions(self, sdk: AsyncOpenAI, model: str) -> None:
        answer = await sdk.completions.create(model=model, prompt="Once upon a time", max_tokens=6, logprobs=2, echo=True)
        check(raw(answer), Completion)
        assert answer.choices[0].text.startswith("Once upon a time")
        assert answer.choices[0].logprobs is not None
        stream = await sdk.completions.create(model=model, prompt=["One", "Two"], max_tokens=4, n=2, seed=1, stream=True)
        texts: dict[int, str] = {}
        async for chunk in stream:
            check(raw(chunk), Completion)
            for choice in chunk.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
        whole = await sdk.completions.create(model=model, prompt=["One", "Two"], max_tokens=4, n=2, seed=1)
        assert texts == {choice.index: choice.text for choice in whole.choices}

    async def test_token_ids_as_prompt(self, sdk: AsyncOpenAI, base_url: str, api_key: str, model: str) -> None:
        headers = {"authorization": f"Bearer {api_key}"}
        async with httpx.AsyncClient(base_url=base_url, headers=headers) as http:
            ids = (await http.post("/tokenize", json={"model": model, "prompt": "The sea is"})).json()["tokens"]
            assert (await http.post("/detokenize", json={"model": model, "tokens": ids})).json()["prompt"].endswith("The sea is")
        options: Any = {"model": model, "max_tokens": 5, "seed": 1}
        by_text = await sdk.completions.create(**options, prompt="The sea is")
        by_ids = await sdk.completions.create(**options, prompt=ids)
        assert by_text.choices[0].text == by_ids.choices[0].text

    async def test_our_own_parameters_through_extra_body(self, sdk: AsyncOpenAI, model: str) -> None:
        extra = {"top_k": 5, "min_p": 0.01, "min_tokens": 4, "repetition_penalty": 1.1, "ignore_eos": True, "cache_salt": "me"}
        answer = await sdk.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4, extra_body=extra)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4

    async def test_speculation_can_be_chosen_and_changes_nothing(self, sdk: AsyncOpenAI, model: str) -> None:
        options: Any = {"model": model, "messages": MESSAGES, "seed": 4, "max_tokens": 24, "temperature": 0.9}
        answers = {}
        for choice in ("off", None, {"drafter": "ngram", "max_nodes": 3}, {"drafter": ["ngram", "prediction"], "max_nodes": 8}):
            extra = {"speculation": choice, "include_speculation": True}
            answer = await sdk.chat.completions.create(**options, extra_body=extra)
            report = answer.model_extra["metrics"]["speculative_decoding"]  # type: ignore[index]  # ours, beyond OpenAI's
            assert answer.usage is not None
            answers[str(choice)] = (answer.choices[0].message.content, answer.usage.completion_tokens)
            assert report["lossless"] is True
            assert 0 < report["num_spec_steps"] <= answer.usage.completion_tokens
            assert 0 <= report["num_accepted_draft_tokens"] <= report["num_draft_tokens"]
            if choice == "off":
                assert (report["num_draft_tokens"], report["num_spec_tokens"]) == (0, 0)
                assert report["num_spec_steps"] == answer.usage.completion_tokens or answer.choices[0].finish_reason == "stop"
            elif choice is not None:
                assert report["num_spec_tokens"] == choice["max_nodes"]
                assert set(report["drafters"]) <= {"ngram", "prediction"}
        assert len(set(answers.values())) == 1

    async def test_a_stream_reports_on_speculation_at_its_end(self, sdk: AsyncOpenAI, model: str) -> None:
        options: Any = {"model": model, "messages": MESSAGES, "seed": 4, "max_tokens": 12, "stream": True}
        for more in ({}, {"stream_options": {"include_usage": True}}):
            stream = await sdk.chat.completions.create(**options, **more, extra_body={"include_speculation": True})
            chunks = [chunk async for chunk in stream]
            reports = [(chunk.model_extra or {}).get("metrics") for chunk in chunks]
            assert reports[:-1] == [None] * (len(chunks) - 1)
            assert reports[-1] is not None
            assert reports[-1]["speculative_decoding"]["num_spec_steps"] > 0
        completions = await sdk.completions.create(model=model, prompt="One, two", extra_body={"include_speculation": True})
        assert (completions.model_extra or {})["metrics"]["speculative_decoding"]["lossless"] is True

    async def test_errors_raise_the_right_exceptions(self, sdk: AsyncOpenAI, base_url: str, model: str) -> None:
        create = sdk.chat.completions.create
        with pytest.raises(openai.BadRequestError) as bad:
            await create(model=model, messages=MESSAGES, temperature=3)
        assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
        with pytest.raises(openai.NotFoundError) as missing:
            await create(model="no-such-model", messages=MESSAGES)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as unknown:
            await create(model=model, messages=MESSAGES, extra_body={"surprise": 1})
        assert unknown.value.param == "surprise"
        with pytest.raises(openai.BadRequestError) as drafter:
            await create(model=model, messages=MESSAGES, extra_body={"speculation": {"drafter": "crystal ball"}})
        assert drafter.value.param == "speculation.drafter"
        with pytest.raises(openai.BadRequestError) as long:
            await sdk.completions.create(model=model, prompt="word " * 200_000)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError):
            await create(model=model, messages=MESSAGES, stream=True, n=0)
        with pytest.raises(openai.AuthenticationError) as denied:
            async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key="wrong", max_retries=0) as other:
                await other.models.list()
        assert denied.value.code == "invalid_api_key"
