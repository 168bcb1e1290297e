"""vLLM's names for what we measure, for the dashboards, autoscalers and gateways that know those (--vllm-metrics).

The same observations under a second name, never a second meaning: a metric of vLLM that we do not have is not there.
Names as in vLLM's `vllm/v1/metrics`; what the Gateway API inference extension reads is among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from engine.messages import EngineInfo

VLLM = "vllm:"
ENGINE = {"engine": "0"}  # vLLM labels every series with the engine's number

# Without prefixes; a counter's name is that of its family, without `_total`.
SHARED = frozenset(
    {
        "corrupted_requests",
        "e2e_request_latency_seconds",
        "generation_tokens",
        "inter_token_latency_seconds",
        "iteration_tokens_total",
        "kv_cache_usage_perc",
        "num_preemptions",
        "num_requests_running",
        "num_requests_waiting",
        "prefix_cache_hits",
        "prefix_cache_queries",
        "prompt_tokens",
        "request_decode_time_seconds",
        "request_generation_tokens",
        "request_inference_time_seconds",
        "request_max_num_generation_tokens",
        "request_num_preemptions",
        "request_params_max_tokens",
        "request_params_n",
        "request_prefill_time_seconds",
        "request_prompt_tokens",
        "request_queue_time_seconds",
        "request_success",
        "request_time_per_output_token_seconds",
        "spec_decode_num_accepted_tokens",
        "spec_decode_num_accepted_tokens_per_pos",
        "spec_decode_num_draft_tokens",
        "spec_decode_num_drafts",
        "time_to_first_token_seconds",
    }
)


def aliases(families: Iterable[Metric], prefix: str) -> Iterator[Metric]:
    """A copy of each family that vLLM has too, under vLLM's name. `prefix` is ours."""
    for family in families:
        name = family.name.removeprefix(prefix)
        if name in SHARED:
            yield _renamed(family, prefix)


def _renamed(family: Metric, prefix: str) -> Metric:
    copy = Metric(VLLM + family.name.removeprefix(prefix), family.documentation, family.type)
    for sample in family.samples:
        copy.samples.append(sample._replace(name=VLLM + sample.name.removeprefix(prefix), labels=ENGINE | sample.labels))
    return copy


def cache_config(infos: Sequence[EngineInfo | None], labels: dict[str, str]) -> Metric:
    """Always 1: the labels say how large the KV pool of each engine is, wherever it lies. None: not known yet."""
    facts = ["block_size", "num_gpu_blocks", "kv_cache_size_tokens"]
    family = GaugeMetricFamily(VLLM + "cache_config_info", "Size of the KV pool", labels=[*ENGINE, *labels, *facts])
    for number, info in enumerate(infos):
        if info is not None:
            values = [number, *labels.values(), info.block_size, info.num_blocks, info.num_blocks * info.block_size]
            family.add_metric([str(value) for value in values], 1)
    return family
