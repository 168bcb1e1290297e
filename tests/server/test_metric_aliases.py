"""--vllm-metrics: the same observations under vLLM's names, and nothing that vLLM means otherwise."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from engine.messages import EngineStats
from server.metric_aliases import SHARED
from server.metrics import PREFIX
from tests.server.conftest import Api, ApiFactory

# What vLLM's grafana.json and vllm_speculative_decoding.json (examples/observability) ask for, and a few that others do.
DASHBOARDS = {
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:kv_cache_usage_perc",
    "vllm:num_preemptions_total",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prompt_tokens_total",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:request_params_max_tokens_bucket",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_success_total",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:spec_decode_num_accepted_tokens_per_pos_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:time_to_first_token_seconds_bucket",
}
# What the endpoint picker of the Gateway API inference extension reads.
GATEWAY = {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc", "vllm:cache_config_info"}


async def scrape(api: Api) -> list[tuple[str, dict[str, str], float]]:
    text = (await api.http.get("/metrics")).text
    return [
        (sample.name, sample.labels, sample.value) for family in text_string_to_metric_families(text) for sample in family.samples
    ]


def with_steps(api: Api) -> Api:
    api.engine.stats = EngineStats(
        steps=3, generation_tokens=7, num_accepted_tokens_per_pos=[3, 1], blocks_used=16, blocks_total=64
    )
    return api


async def test_the_aliases_are_there_when_asked_for(make_api: ApiFactory) -> None:
    names = {name for name, _, _ in await scrape(with_steps(make_api()))}
    assert not [name for name in names if name.startswith("vllm:")]
    api = with_steps(make_api(vllm_metrics=True))
    await api.chat()
    names = {name for name, _, _ in await scrape(api)}
    assert names >= DASHBOARDS
    assert names >= GATEWAY
    assert {name.removeprefix("vllm:") for name in names if name.startswith("vllm:")} <= {
        name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)
    } | {"cache_config_info"}


async def test_an_alias_is_the_same_observation_labelled_as_vllm_does(make_api: ApiFactory) -> None:
    api = with_steps(make_api(vllm_metrics=True))
    await api.chat()
    samples = await scrape(api)
    ours = {(name.removeprefix(PREFIX), *sorted(labels.items())): value for name, labels, value in samples if ":" in name}
    theirs = [(name.removeprefix("vllm:"), labels, value) for name, labels, value in samples if name.startswith("vllm:")]
    compared = 0
    for name, labels, value in theirs:
        assert (labels["engine"], labels["model_name"]) == ("0", "fake")
        own = {key: label for key, label in labels.items() if key != "engine"}
        if name != "cache_config_info":
            assert ours[name, *sorted(own.items())] == value
            compared += 1
    assert compared > 300
    assert ("vllm:kv_cache_usage_perc", {"engine": "0", "model_name": "fake"}, 0.25) in samples


async def test_the_kv_pool_is_described(make_api: ApiFactory) -> None:
    api = make_api(vllm_metrics=True)
    (labels,) = [labels for name, labels, value in await scrape(api) if name == "vllm:cache_config_info" and value == 1]
    assert (labels["block_size"], labels["num_gpu_blocks"], labels["kv_cache_size_tokens"]) == ("16", "64", "1024")
    api.engine.info = None  # still loading: not known, not invented
    assert "vllm:cache_config_info" not in {name for name, _, _ in await scrape(api)}


async def test_the_text_is_one_that_prometheus_takes(make_api: ApiFactory) -> None:
    """No family comes twice."""
    text = (await make_api(vllm_metrics=True).http.get("/metrics")).text
    typed = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")]
    assert len(typed) == len(set(typed))
    assert sum(name.startswith("vllm:") for name in typed) == len(SHARED) + 1
