"""/metrics: what is counted, and that it never goes backwards."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.messages import EngineStats
from server.app import create_app
from server.config import ServerConfig
from server.engine_counters import NUMBERS, TABLES
from server.fleet import Fleet
from server.histogram import Histogram
from server.metrics import ENGINE_COUNTERS, ENGINE_GAUGES, ENGINE_TABLES, HISTOGRAMS, PREFIX
from server.router import Router
from server.tokenizer import Tokenizer
from tests.server.conftest import Api, ApiFactory, error, says
from tests.server.fakes import FakeEngineClient

LABEL = {"model_name": "fake"}


async def scrape(api: Api) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = await api.http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name.removeprefix(PREFIX), frozenset(sample.labels.items() - LABEL.items())): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith(PREFIX)
    }


def of(samples: Any, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "corrupted_requests_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_draft_seconds_total",
    "spec_decode_verify_seconds_total",
    "spec_decode_forward_seconds_total",
]


async def test_every_name_is_there_from_the_start(api: Api) -> None:
    names = {name for name, _ in await scrape(api)}
    assert set(NAMES) <= names
    assert {f"{name}_count" for name in HISTOGRAMS} <= names
    assert {f"{name}_total" for name in ENGINE_COUNTERS} <= names
    assert ENGINE_GAUGES.keys() <= names
    text = (await api.http.get("/metrics")).text
    assert "process_resident_memory_bytes" in text
    assert all(f"# HELP {PREFIX}{name} " in text for name in HISTOGRAMS)


async def test_prometheus_gets_the_names_that_everybody_else_gets(api: Api) -> None:
    plain = await api.http.get("/metrics")
    accept = (
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5,"
        "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
    )
    scraped = await api.http.get("/metrics", headers={"accept": accept})
    assert scraped.headers["content-type"] == plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert [line.split(" ")[0] for line in scraped.text.splitlines()] == [line.split(" ")[0] for line in plain.text.splitlines()]
    assert 'outrider:engine_ready{model_name="fake"} 1.0' in scraped.text


async def test_the_engine_s_numbers(api: Api) -> None:
    stats = EngineStats(
        steps=10,
        running=3,
        waiting=2,
        blocks_used=16,
        blocks_total=64,
        prompt_tokens=100,
        generation_tokens=50,
        prefix_cache_queries=100,
        prefix_cache_hits=40,
        preemptions=1,
        num_drafts=9,
        num_draft_tokens=30,
        num_accepted_tokens=20,
        num_accepted_tokens_per_pos=[9, 7, 4],
        draft_tokens_by_drafter={"ngram": 30},
        drafter_fallbacks={"raised": 1},
        num_dropped_tokens=6,
        drafts_by_drafter={"ngram": 9},
        seconds_draft_by_drafter={"ngram": 0.375, "prediction": 0.125},
        predicted_tokens=48.5,
        predicted_seconds=0.75,
        decided_tokens=45,
        decided_seconds=1.0,
        calibration_error=0.0625,
        cost_error=0.125,
        looping_sequences=1,
        uncomputed_tokens=75,
        seconds_step=2.5,
        seconds_draft=0.5,
        seconds_verify=0.25,
        draft_nodes=[0, 3, 3],
        draft_depths=[0, 2, 3],
        iteration_tokens=[1, 4, 4],
    )
    api.engine.stats = stats
    assert api.engine.on_stats is not None
    api.engine.on_stats(stats)
    samples = await scrape(api)
    await scrape(api)  # looking changes nothing
    assert (of(samples, "num_requests_running"), of(samples, "num_requests_waiting")) == (3, 2)
    assert of(samples, "kv_cache_usage_perc") == 0.25
    assert of(samples, "generation_tokens_total") == 50
    assert of(samples, "prefix_cache_hits_total") == 40
    assert [of(samples, "spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(3)] == [9, 7, 4]
    assert of(samples, "spec_decode_draft_tokens_by_drafter_total", drafter="ngram") == 30
    assert of(samples, "drafter_fallbacks_total", reason="raised") == 1
    assert of(samples, "spec_decode_draft_seconds_total") == 0.5
    assert of(samples, "spec_decode_draft_nodes_count") == 3
    assert of(samples, "spec_decode_draft_nodes_sum") == 6
    assert of(samples, "iteration_tokens_total_sum") == 9
    assert of(samples, "spec_decode_draft_depth_count") == 3
    assert of(samples, "spec_decode_draft_depth_sum") == 5
    assert of(samples, "spec_decode_num_dropped_tokens_total") == 6  # never seen by the model
    assert of(samples, "spec_decode_num_rejected_tokens_total") == 10  # seen and rejected
    assert of(samples, "spec_decode_drafts_by_drafter_total", drafter="ngram") == 9
    assert of(samples, "spec_decode_draft_seconds_by_drafter_total", drafter="prediction") == 0.125
    assert of(samples, "spec_decode_predicted_tokens_total") == 48.5
    assert of(samples, "spec_decode_predicted_seconds_total") == 0.75
    assert of(samples, "spec_decode_decided_tokens_total") == 45
    assert of(samples, "spec_decode_decided_seconds_total") == 1.0
    assert of(samples, "spec_decode_calibration_error") == 0.0625
    assert of(samples, "spec_decode_cost_error") == 0.125
    assert of(samples, "looping_sequences_total") == 1
    assert of(samples, "num_uncomputed_tokens") == 75
    assert of(samples, "queued_work_seconds") == (75 + 0) / (150 / 2.5)  # nothing has finished: no answer to expect


async def test_counters_go_on_after_an_engine_restart(api: Api) -> None:
    engine, observe = api.engine, api.engine.on_stats
    assert observe is not None

    def lives(*stats: EngineStats) -> None:
        for one in stats:
            engine.stats = one
            observe(one)

    table, seconds = {"ngram": 1}, {"seconds_draft_by_drafter": {"ngram": 0.5}, "predicted_seconds": 0.25, "cost_error": 0.5}
    lives(
        EngineStats(steps=5, generation_tokens=100, num_accepted_tokens_per_pos=[5, 2], draft_tokens_by_drafter=table, **seconds)
    )
    engine.stats = EngineStats()  # the client between two lives
    seen = await scrape(api)
    assert of(seen, "generation_tokens_total") == 100
    engine.restarts = 1
    seconds["cost_error"] = 0.125
    lives(EngineStats(steps=9, generation_tokens=130, num_accepted_tokens_per_pos=[1], draft_tokens_by_drafter=table, **seconds))
    seen = await scrape(api)
    assert of(seen, "generation_tokens_total") == 230
    assert of(seen, "engine_steps_total") == 14
    assert of(seen, "spec_decode_num_accepted_tokens_per_pos_total", position="0") == 6
    assert of(seen, "spec_decode_num_accepted_tokens_per_pos_total", position="1") == 2
    assert of(seen, "spec_decode_draft_tokens_by_drafter_total", drafter="ngram") == 2
    assert of(seen, "spec_decode_draft_seconds_by_drafter_total", drafter="ngram") == 1.0
    assert of(seen, "spec_decode_predicted_seconds_total") == 0.5
    assert of(seen, "spec_decode_cost_error") == 0.125  # a gauge: of the engine that lives
    assert of(seen, "engine_restarts_total") == 1


async def test_several_engines_are_told_apart(tokenizer: Tokenizer) -> None:
    ones = [FakeEngineClient(says(tokenizer, "Hello")) for _ in range(2)]
    fleet = Fleet(ones, Router(ones, 16))  # type: ignore[arg-type]
    app = create_app(ServerConfig(served_model_name="fake"), fleet, tokenizer)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        api = Api(app, ones[0], http, tokenizer)
        for _ in range(3):
            assert (await api.chat(messages=[{"role": "user", "content": "Hi " * 20}])).status_code == 200
        assert (await api.complete(prompt="Something else")).status_code == 200
        table = {"suffix": 3}
        for number, one in enumerate(ones):
            one.stats = EngineStats(generation_tokens=10 + number, running=number, blocks_used=number, blocks_total=4)
            one.stats.num_accepted_tokens_per_pos, one.stats.draft_tokens_by_drafter = [5 + number], table
        ones[1].restarts = 1
        samples = await scrape(api)
        ones[1].ready = False
        later = await scrape(api)
    for number in (0, 1):
        engine = {"engine": str(number)}
        assert of(samples, "generation_tokens_total", **engine) == 10 + number
        assert of(samples, "num_requests_running", **engine) == number
        assert of(samples, "kv_cache_usage_perc", **engine) == number / 4
        assert of(samples, "spec_decode_num_accepted_tokens_per_pos_total", position="0", **engine) == 5 + number
        assert of(samples, "spec_decode_draft_tokens_by_drafter_total", drafter="suffix", **engine) == 3
        assert of(samples, "engine_restarts_total", **engine) == number
        assert (of(samples, "engine_ready", **engine), of(later, "engine_ready", **engine)) == (1, 1 - number)
        assert of(samples, "routed_requests_total", **engine) == (3, 1)[number]
        assert of(samples, "routed_owed_tokens", **engine) == 0
    assert of(samples, "routed_matched_tokens_total", engine="0") > 40
    assert of(samples, "requests_in_flight") == 0


async def test_a_single_engine_has_no_number(api: Api) -> None:
    assert not [labels for _, labels in await scrape(api) if "engine" in dict(labels)]


async def test_requests_are_measured(make_api: ApiFactory) -> None:
    api = make_api("one two three four", tokens_per_step=2)
    await api.chat(max_tokens=4)
    await api.chat(n=2, stream=True)
    samples = await scrape(api)
    assert of(samples, "request_success_total", finished_reason="length") == 1
    assert of(samples, "request_success_total", finished_reason="stop") == 2
    assert of(samples, "request_success_total", finished_reason="abort") == 0
    assert of(samples, "time_to_first_token_seconds_count") == 3
    assert of(samples, "inter_token_latency_seconds_count") == 2 + 2 * 3  # 4 tokens in 2 steps; 5 tokens in 3 steps, twice
    assert of(samples, "request_generation_tokens_sum") == 4 + 5 + 5
    assert of(samples, "request_params_n_sum") == 3
    assert of(samples, "request_params_max_tokens_sum") > 4
    assert of(samples, "request_prompt_tokens_count") == 2
    assert of(samples, "e2e_request_latency_seconds_count") == 3
    assert of(samples, "request_queue_time_seconds_count") == 3
    assert of(samples, "request_prefill_time_seconds_count") == 3
    assert of(samples, "spec_decode_sequence_acceptance_count") == 3
    assert of(samples, "request_decode_time_seconds_count") == 3
    assert of(samples, "requests_in_flight") == 0


async def test_refusals_are_counted_by_code(api: Api) -> None:
    error(await api.chat(n=0), 400)
    error(await api.chat(model="x"), 404)
    error(await api.chat(model="x"), 404)
    error(await api.http.get("/nothing"), 404)
    samples = await scrape(api)
    assert of(samples, "rejected_requests_total", status="429", code="server_overloaded") == 0  # from the start
    assert of(samples, "rejected_requests_total", status="400", code="invalid_value") == 1
    assert of(samples, "rejected_requests_total", status="404", code="model_not_found") == 2
    assert of(samples, "rejected_requests_total", status="404", code="not_found") == 1


async def test_requests_in_flight(api: Api) -> None:
    gate = api.engine.gate = asyncio.Semaphore(0)
    task = asyncio.create_task(api.chat())
    await api.engine.until(lambda: api.engine.num_inflight == 1)
    assert of(await scrape(api), "requests_in_flight") == 1
    for _ in range(100):
        gate.release()
    await task
    assert of(await scrape(api), "requests_in_flight") == 0


async def test_two_apps_share_nothing(make_api: ApiFactory) -> None:
    one, other = make_api(), make_api()
    await one.chat()
    assert of(await scrape(one), "request_success_total", finished_reason="stop") == 1
    assert of(await scrape(other), "request_success_total", finished_reason="stop") == 0


def test_a_histogram_counts_like_prometheus() -> None:
    histogram = Histogram("h", "help", (1.0, 2.0, 5.0))
    for value, count in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(value, count)
    samples = {sample.labels.get("le", sample.name): sample.value for sample in histogram.family({}).samples}
    assert samples == {"1.0": 3, "2.0": 4, "5.0": 4, "+Inf": 7, "h_count": 7, "h_sum": 0.5 + 2.0 + 1.5 + 27.0}
    with pytest.raises(ValueError, match="rise"):
        Histogram("h", "help", (1.0, 1.0))


def test_every_number_of_the_engine_is_exported_and_survives_a_restart() -> None:
    """A field added to EngineStats and forgotten here would be measured for nobody."""
    numbers = {field for _, field in (*ENGINE_COUNTERS.values(), *ENGINE_GAUGES.values())}
    tables = {field for _, _, field in ENGINE_TABLES.values()}
    by_hand = {"blocks_used", "blocks_total", "num_accepted_tokens_per_pos", "draft_depths", "draft_nodes", "iteration_tokens"}
    assert numbers | tables | by_hand == set(EngineStats.__struct_fields__)
    assert set(NUMBERS) == {field for _, field in ENGINE_COUNTERS.values()}
    assert set(TABLES) == tables
