"""The whole server over a real port with a real model: the official SDK, disconnects, truth of the counters, a dead engine."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from tests.live.conftest import KEY, MODEL, Server
from tests.server.sdk_suite import MESSAGES, SdkSuite

Samples = dict[str, float]


@pytest.fixture
async def http(server: Server) -> AsyncIterator[httpx.AsyncClient]:
    headers = {"authorization": f"Bearer {KEY}"}
    async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as client:
        yield client


async def metrics(http: httpx.AsyncClient) -> Samples:
    """Every sample by name; those with labels of their own are added up."""
    totals: Samples = {}
    for family in text_string_to_metric_families((await http.get("/metrics")).text):
        for sample in family.samples:
            name = sample.name.removeprefix("outrider:")
            totals[name] = totals.get(name, 0.0) + sample.value
    return totals


async def metrics_where(http: httpx.AsyncClient, true: Callable[[Samples], bool]) -> Samples:
    """The engine reports about itself every now and then, so its counters are asked for until they have arrived."""
    async with asyncio.timeout(60):
        while not true(samples := await metrics(http)):  # noqa: ASYNC110  # another process: it has no event of ours
            await asyncio.sleep(0.1)
    return samples


def idle(samples: Samples) -> bool:
    return samples["num_requests_running"] == samples["num_requests_waiting"] == samples["kv_cache_usage_perc"] == 0


class TestLive(SdkSuite):
    """The SDK's suite against the real thing."""


async def test_counters_tell_the_truth(http: httpx.AsyncClient) -> None:
    before = await metrics_where(http, idle)
    usage = [
        (await http.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 9, "n": n})).json()["usage"]
        for prompt, n in (("The sea", 1), ("The sky is", 3))
    ]
    tokens = sum(one["completion_tokens"] for one in usage)
    wanted = before["generation_tokens_total"] + tokens
    after = await metrics_where(http, lambda samples: idle(samples) and samples["generation_tokens_total"] >= wanted)
    assert after["generation_tokens_total"] == wanted
    assert after["request_generation_tokens_sum"] - before["request_generation_tokens_sum"] == tokens
    assert after["request_success_total"] - before["request_success_total"] == 4
    assert after["spec_decode_num_accepted_tokens_total"] <= after["spec_decode_num_draft_tokens_total"]
    assert after["engine_step_seconds_total"] >= after["spec_decode_forward_seconds_total"] > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_frees_everything(http: httpx.AsyncClient, server: Server, stream: bool) -> None:
    before = await metrics_where(http, idle)
    body = {"model": MODEL, "prompt": "Tell me everything.", "max_tokens": 900, "ignore_eos": True, "n": 4, "stream": stream}
    leaving = httpx.AsyncClient(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}, timeout=120)
    call = asyncio.create_task(leaving.post("/v1/completions", json=body))
    await metrics_where(http, lambda samples: samples["num_requests_running"] > 0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await leaving.aclose()
    after = await metrics_where(http, idle)
    assert after["client_disconnects_total"] == before["client_disconnects_total"] + 1
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < 4 * 900


async def test_a_request_chooses_its_drafters(http: httpx.AsyncClient) -> None:
    text = "One, two, three, four, five, six, seven, eight, nine, ten."
    body: dict[str, Any] = {"model": MODEL, "prompt": text, "max_tokens": 24, "temperature": 0, "include_speculation": True}
    answer = (await http.post("/v1/completions", json=body | {"speculation": "off"})).json()["choices"][0]["text"]
    body["prediction"] = {"type": "content", "content": answer}
    drafted = {}
    for choice in ("suffix", "prediction"):
        response = (await http.post("/v1/completions", json=body | {"speculation": {"drafter": choice, "max_nodes": 2}})).json()
        assert response["choices"][0]["text"] == answer
        report = response["metrics"]["speculative_decoding"]
        drafted[choice] = set(report["drafters"])
        assert len(report["acceptance_histogram"]) <= 3
        assert report["num_draft_tokens"] <= 2 * report["num_spec_steps"]
    assert drafted["suffix"] <= {"suffix"}
    assert drafted["prediction"] == {"prediction"}


async def test_a_stop_string_ends_the_work(http: httpx.AsyncClient) -> None:
    before = await metrics_where(http, idle)
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stop": ["e"], "seed": 1}
    answer = (await http.post("/v1/completions", json=body)).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    after = await metrics_where(http, idle)
    assert after["generation_tokens_total"] - before["generation_tokens_total"] < 900


async def test_the_http_process_never_loads_torch(server: Server, http: httpx.AsyncClient) -> None:
    await http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi", "max_tokens": 1})
    front = psutil.Process(server.process.pid)
    mapped = {Path(entry.path).name for entry in front.memory_maps()}
    assert not [name for name in mapped if "torch" in name]
    assert any("torch" in Path(entry.path).name for entry in server.engine().memory_maps())


async def test_a_killed_engine_comes_back(server: Server, http: httpx.AsyncClient) -> None:
    """Running requests end with an error they can act on, health tells, and the next request is served."""
    old = server.engine()
    sdk = AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120)
    options: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 800, "extra_body": {"ignore_eos": True}}
    whole = asyncio.create_task(http.post("/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 900, "n": 2}))
    stream = await sdk.chat.completions.create(**options, stream=True)
    await anext(aiter(stream))
    old.send_signal(signal.SIGKILL)
    with pytest.raises(Exception, match="engine"):
        async for _ in stream:
            pass
    answer = await whole
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_unavailable"
    assert int(answer.headers["retry-after"]) > 0
    assert (await http.get("/live")).status_code == 200
    async with asyncio.timeout(120):
        while (await http.get("/ready")).status_code != 200:  # noqa: ASYNC110  # as a load balancer does
            await asyncio.sleep(0.1)
    assert (await http.post("/v1/completions", json={"model": MODEL, "prompt": "Hi", "max_tokens": 2})).status_code == 200
    assert server.engine().pid != old.pid
    samples = await metrics_where(http, idle)
    assert samples["engine_restarts_total"] == 1
    assert samples["request_success_total"] > 0
    await sdk.close()
