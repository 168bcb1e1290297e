"""The official SDK over a real port, with a scripted engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from engine.request import Request
from server.http import HttpServer, bind, url
from tests.server.conftest import Api, ApiFactory
from tests.server.sdk_suite import MESSAGES, SdkSuite

KEY = "sk-test"
TEXT = "The sea is wide 🌊 and it is never quite still, they say; others say it sleeps."


class TestSdk(SdkSuite):
    @pytest.fixture
    def api(self, make_api: ApiFactory) -> Api:
        """Answers that differ by sample and by prompt, but never by seed."""
        api = make_api(TEXT, tokens_per_step=3, api_key=[KEY])

        def script(request: Request, index: int) -> list[int]:
            lead = f"{index}/{len(request.prompt_ids)}: " if request.n > 1 else ""
            return [*api.tokenizer.encode(lead + TEXT, False), min(api.tokenizer.eos_ids)]

        api.engine.script = script
        return api

    @pytest.fixture
    async def base_url(self, api: Api) -> AsyncIterator[str]:
        with bind("127.0.0.1", 0) as sock:
            server = HttpServer(api.app)
            task = asyncio.create_task(server.serve(sockets=[sock]))
            yield url(sock)
            server.should_exit = True
            await task

    @pytest.fixture
    def model(self) -> str:
        return "fake"

    @pytest.fixture
    def api_key(self) -> str:
        return KEY

    async def test_overload_and_a_dead_engine(self, sdk: AsyncOpenAI, api: Api) -> None:
        create = sdk.chat.completions.create
        api.app.state.frontend.admission.limit = 0
        with pytest.raises(openai.RateLimitError) as full:
            await create(model="fake", messages=MESSAGES)
        assert full.value.code == "server_overloaded"
        api.app.state.frontend.admission.limit = 9
        api.engine.fail_after = 2
        stream = await create(model="fake", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="NaN"):
            async for _ in stream:
                pass
        with pytest.raises(openai.InternalServerError):
            await create(model="fake", messages=MESSAGES)

    async def test_the_sdk_tries_again_by_itself(self, base_url: str, api: Api) -> None:
        """A 429 with Retry-After is not the end for a client with the SDK's defaults."""
        front = api.app.state.frontend
        front.admission.limit = 0
        refused = asyncio.Event()
        front.metrics.observe_failure = lambda failure: refused.set()
        async with AsyncOpenAI(base_url=f"{base_url}/v1", api_key=KEY, max_retries=2) as client:
            call = asyncio.create_task(client.chat.completions.create(model="fake", messages=MESSAGES))
            await asyncio.wait_for(refused.wait(), 20)
            front.admission.limit = 9
            assert (await call).choices[0].message.content == TEXT

    async def test_leaving_a_stream_early_aborts(self, sdk: AsyncOpenAI, api: Api) -> None:
        api.engine.gate = asyncio.Semaphore(2)
        stream = await sdk.chat.completions.create(model="fake", messages=MESSAGES, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await api.engine.until(lambda: bool(api.engine.aborted))
        assert api.engine.num_inflight == 0
