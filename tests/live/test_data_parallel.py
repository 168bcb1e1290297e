"""--data-parallel-size 2: two real engines with a tiny model behind one server."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.live.conftest import MODEL, Server, start, stop

FLAGS = ("--data-parallel-size", "2", "--dtype", "float32", "--num-threads", "1", "--no-profile")
BLOCK = 16
Samples = dict[tuple[str, str], float]  # by name and engine


@pytest.fixture(scope="module")
def pair(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start(tiny_llama_dir, tmp_path_factory.mktemp("pair") / "stderr", *FLAGS)
    yield server
    family = psutil.Process(server.process.pid).children(recursive=True)
    assert stop(server) == 0, server.errors.read_text()[-4000:]
    assert not [process for process in family if process.is_running()]


@pytest.fixture
async def http(pair: Server) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=pair.url, timeout=60) as client:
        yield client


@pytest.fixture
async def sdk(pair: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{pair.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


async def scrape(http: httpx.AsyncClient) -> Samples:
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    return {
        (sample.name.removeprefix("outrider:"), sample.labels["engine"]): sample.value
        for family in families
        for sample in family.samples
        if "engine" in sample.labels
    }


async def until(http: httpx.AsyncClient, true: Callable[[Samples], bool]) -> Samples:
    async with asyncio.timeout(60):
        while not true(samples := await scrape(http)):  # noqa: ASYNC110  # another process: it has no event of ours
            await asyncio.sleep(0.05)
    return samples


def total(samples: Samples, name: str) -> float:
    return samples[name, "0"] + samples[name, "1"]


def grown(samples: Samples, before: Samples, name: str) -> list[float]:
    return [samples[name, engine] - before[name, engine] for engine in "01"]


def idle(samples: Samples) -> bool:
    return total(samples, "num_requests_running") == total(samples, "num_requests_waiting") == 0


def body(ids: list[int], max_tokens: int = 4, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": ids, "max_tokens": max_tokens, "ignore_eos": True, "seed": 1, **fields}


async def test_both_engines_work_and_give_the_same_answers(sdk: AsyncOpenAI, http: httpx.AsyncClient) -> None:
    before = await until(http, idle)
    messages: Any = [{"role": "user", "content": "Write one sentence about the sea."}]

    async def ask(salt: str) -> str:
        options = {"cache_salt": salt, "ignore_eos": True}
        answer = await sdk.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=30, seed=7, temperature=0.8, extra_body=options
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 30
        return answer.choices[0].message.content or ""

    answers = await asyncio.gather(*(ask(f"tenant {i}") for i in range(10)))
    assert len(set(answers)) == 1
    after = await until(http, lambda samples: idle(samples) and sum(grown(samples, before, "generation_tokens_total")) == 300)
    assert min(grown(after, before, "generation_tokens_total")) >= 90
    assert sum(grown(after, before, "routed_requests_total")) == 10


async def test_prefixes_are_found_more_often_than_by_chance(http: httpx.AsyncClient) -> None:
    """Four rounds of 12 conversations in any order, 4 at a time; 160 tokens are shared in each."""
    before = await until(http, idle)
    rng = random.Random(3)
    shared = [[rng.randrange(5, 90) for _ in range(10 * BLOCK)] for _ in range(12)]
    room = asyncio.Semaphore(4)

    async def ask(what: int) -> None:
        async with room:
            tail = [rng.randrange(5, 90) for _ in range(BLOCK // 2)]
            assert (await http.post("/v1/completions", json=body(shared[what] + tail))).status_code == 200

    for _ in range(4):
        await asyncio.gather(*(ask(what) for what in rng.sample(range(12), 12)))
    after = await until(http, lambda samples: idle(samples) and sum(grown(samples, before, "generation_tokens_total")) == 4 * 48)
    found = sum(grown(after, before, "prefix_cache_hits_total")) / (12 * 4 * 10 * BLOCK)
    # By chance, a request with k before it in its conversation finds their blocks when one of them went the same way.
    chance = sum(1 - 0.5**k for k in range(4)) / 4
    assert found > 1.2 * chance
    assert min(grown(after, before, "routed_requests_total")) >= 12
    believed = sum(grown(after, before, "routed_matched_tokens_total")) / (12 * 4 * 10 * BLOCK)
    assert believed == pytest.approx(0.75)


async def test_a_killed_engine_takes_its_own_requests_only_and_comes_back(
    pair: Server, sdk: AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    """Both engines stand still while requests arrive; one is killed, the other goes on."""
    before = await until(http, idle)
    old = pair.engines()
    for engine in old:
        engine.send_signal(signal.SIGSTOP)

    async def whole(number: int) -> int:
        answer = await http.post("/v1/completions", json=body([5 + number] * 40, max_tokens=50))
        if answer.status_code != 200:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
            assert "SIGKILL" in answer.json()["error"]["message"]
        return answer.status_code

    async def streamed(number: int) -> int:
        options: Any = {"model": MODEL, "prompt": [50 + number] * 40, "max_tokens": 50, "extra_body": {"ignore_eos": True}}
        try:
            last = [chunk async for chunk in await sdk.completions.create(**options, stream=True)][-1]
        except openai.APIError as error:
            return 503 if "SIGKILL" in str(error) else -1
        assert last.choices[0].finish_reason == "length"
        return 200

    asked = [asyncio.create_task(ask(number)) for number in range(8) for ask in (whole, streamed)]
    held = await until(http, lambda samples: sum(grown(samples, before, "routed_requests_total")) == 16)
    shares = grown(held, before, "routed_requests_total")
    assert min(shares) >= 4
    old[0].kill()
    old[1].send_signal(signal.SIGCONT)
    outcomes = await asyncio.wait_for(asyncio.gather(*asked), 60)
    assert sorted([outcomes.count(503), outcomes.count(200)]) == sorted(shares)
    assert 503 in outcomes
    assert (await http.get("/ready")).status_code == 200
    assert (await http.get("/live")).status_code == 200
    assert (await http.post("/v1/completions", json=body([9] * 20))).status_code == 200
    after = await until(
        http, lambda samples: total(samples, "engine_ready") == 2 and total(samples, "engine_restarts_total") == 1
    )
    dead = "0" if after["engine_restarts_total", "0"] else "1"
    assert outcomes.count(503) == shares[int(dead)]
    assert old[1].pid in {engine.pid for engine in pair.engines()} and len(pair.engines()) == 2
    again = await asyncio.gather(*(whole(number) for number in range(100, 106)))
    assert again == [200] * 6
    last = await until(http, lambda samples: min(grown(samples, after, "routed_requests_total")) > 0)
    assert last["routed_owed_tokens", dead] == 0
