"""What /metrics exports: names and meanings. Where vLLM has the metric, the name after the prefix is vLLM's.

Every metric has the label `model_name`. Counters are exported with the suffix `_total`. A "sequence" is one choice of an
answer: a request with n = 4 has four. Times are seconds on this machine's monotonic clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import EngineStats
from server.engine_counters import EngineCounters
from server.histogram import Histogram
from server.metric_aliases import aliases, cache_config
from server.openai.errors import ApiError
from server.queued_work import QueuedWork

if TYPE_CHECKING:
    from server.admission import Admission
    from server.client import EngineClient

PREFIX = "outrider:"
Values = Mapping[tuple[str, ...], float]  # by label values

FAST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TOKEN_GAP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
SLOW = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
STEP = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
DEPTH = (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64)
FEW = (1, 2, 5, 10, 20, 50, 100, 128)
TIMES = (0, 1, 2, 5, 10, 20, 50)
SHARE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 1)

# name -> (meaning, bounds)
HISTOGRAMS: dict[str, tuple[str, tuple[float, ...]]] = {
    "time_to_first_token_seconds": ("From the arrival of a sequence's request to its first token", FAST),
    "inter_token_latency_seconds": ("Time between tokens; k tokens that came in one step count as k k-th parts of it", TOKEN_GAP),
    "request_time_per_output_token_seconds": ("Mean time per token of a sequence after its first", TOKEN_GAP),
    "e2e_request_latency_seconds": ("From the arrival of a sequence's request to its last token", SLOW),
    "request_queue_time_seconds": ("From arrival to the first step that worked on the sequence", SLOW),
    "request_prefill_time_seconds": ("From the first step that worked on the sequence to its first token", SLOW),
    "request_decode_time_seconds": ("From the first token of a sequence to its last", SLOW),
    "request_inference_time_seconds": ("From the first step that worked on the sequence to its last token", SLOW),
    "request_prompt_tokens": ("Prompt tokens of a request", TOKENS),
    "request_generation_tokens": ("Tokens of a finished sequence", TOKENS),
    "request_max_num_generation_tokens": ("Tokens of a request's longest sequence", TOKENS),
    "request_params_n": ("The parameter n", FEW),
    "request_params_max_tokens": ("The most tokens a request's sequences might have", TOKENS),
    "request_num_preemptions": ("How often a finished sequence had lost its KV blocks to others", TIMES),
    "iteration_tokens_total": ("Tokens fed to the model in one step, draft nodes included", STEP),
    "spec_decode_draft_nodes": ("Draft nodes of one step shown to the model, all sequences together", STEP),
    "spec_decode_sequence_acceptance": ("Share of a finished sequence's draft nodes that were accepted", SHARE),
    "spec_decode_draft_depth": ("Depth of the deepest draft node of one step; 0 = nothing drafted", DEPTH),
}

# name -> (meaning, field of EngineStats)
ENGINE_COUNTERS: dict[str, tuple[str, str]] = {
    "prompt_tokens": ("Prompt tokens computed or found in the prefix cache", "prompt_tokens"),
    "generation_tokens": ("Tokens committed", "generation_tokens"),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", "prefix_cache_queries"),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache", "prefix_cache_hits"),
    "num_preemptions": ("Times a sequence lost its KV blocks and had to be computed again", "preemptions"),
    "corrupted_requests": ("Requests ended because the model's logits held NaN", "corrupted_requests"),
    "looping_sequences": ("Sequences whose answer ended in a repetition of 64 or more tokens", "looping_sequences"),
    "engine_steps": ("Steps of the engine", "steps"),
    "spec_decode_num_drafts": ("Draft trees with at least one node", "num_drafts"),
    "spec_decode_num_draft_tokens": ("Draft nodes shown to the model", "num_draft_tokens"),
    "spec_decode_num_accepted_tokens": ("Draft nodes accepted", "num_accepted_tokens"),
    "spec_decode_num_dropped_tokens": ("Draft nodes that the budget dropped before the model saw them", "num_dropped_tokens"),
    "spec_decode_predicted_tokens": ("Tokens that the steps the policy decided were expected to commit", "predicted_tokens"),
    "spec_decode_predicted_seconds": ("Time that the steps the policy decided were expected to take", "predicted_seconds"),
    "spec_decode_decided_tokens": ("Tokens that the steps the policy decided did commit", "decided_tokens"),
    "spec_decode_decided_seconds": ("Time that the steps the policy decided did take", "decided_seconds"),
    "spec_decode_draft_seconds": ("Time spent drafting", "seconds_draft"),
    "spec_decode_forward_seconds": ("Time spent in the model's forward, drafts and plain tokens together", "seconds_forward"),
    "spec_decode_target_law_seconds": ("Time spent applying sampling parameters to logits", "seconds_target_law"),
    "spec_decode_verify_seconds": ("Time spent judging drafts", "seconds_verify"),
    "spec_decode_commit_seconds": ("Time spent applying verdicts", "seconds_commit"),
    "engine_step_seconds": ("Time spent in steps, all of the above included", "seconds_step"),
}
# name -> (meaning, field of EngineStats)
ENGINE_GAUGES: dict[str, tuple[str, str]] = {
    "num_requests_running": ("Sequences being worked on", "running"),
    "num_requests_waiting": ("Sequences waiting to be scheduled", "waiting"),
    "num_uncomputed_tokens": ("Tokens of prompts that no step has computed yet", "uncomputed_tokens"),
    "spec_decode_calibration_error": ("Mean |predicted - observed| survival of a draft node, recent steps", "calibration_error"),
    "spec_decode_cost_error": ("Mean |predicted / measured - 1| of a step's time, recent steps", "cost_error"),
}
# name -> (meaning, label, field of EngineStats)
ENGINE_TABLES: dict[str, tuple[str, str, str]] = {
    "spec_decode_drafts_by_drafter": ("Draft trees by who drafted them", "drafter", "drafts_by_drafter"),
    "spec_decode_draft_tokens_by_drafter": ("Draft nodes by who drafted them", "drafter", "draft_tokens_by_drafter"),
    "spec_decode_accepted_tokens_by_drafter": ("Accepted nodes by who drafted them", "drafter", "accepted_tokens_by_drafter"),
    "spec_decode_draft_seconds_by_drafter": ("Time spent drafting by who drafted", "drafter", "seconds_draft_by_drafter"),
    "drafter_fallbacks": ("Steps in which a drafter failed and nothing was drafted, by reason", "reason", "drafter_fallbacks"),
}


class Metrics(Collector):
    """The counters of one app, in its own registry."""

    def __init__(self, model: str, client: EngineClient, admission: Admission, *, vllm_names: bool = False) -> None:
        self.labels = {"model_name": model}
        self.client = client
        self.admission = admission
        self.vllm_names = vllm_names
        self.queued_work = QueuedWork()
        self.engine = EngineCounters()
        self.histograms = {name: Histogram(PREFIX + name, help_text, b) for name, (help_text, b) in HISTOGRAMS.items()}
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self.rejected: Counter[tuple[str, ...]] = Counter()
        self.disconnects = 0
        self._seen: EngineStats | None = None
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def observe(self, name: str, value: float, count: int = 1) -> None:
        self.histograms[name].observe(value, count)

    def observe_engine(self, stats: EngineStats) -> None:
        """Called with each message of the engine; a message seen before changes nothing."""
        if stats is self._seen:
            return
        self._seen = stats
        self.engine.update(stats, self.client.restarts)
        self.queued_work.update(stats, self.histograms["request_generation_tokens"])
        for nodes in stats.draft_nodes:
            self.observe("spec_decode_draft_nodes", nodes)
        for depth in stats.draft_depths:
            self.observe("spec_decode_draft_depth", depth)
        for tokens in stats.iteration_tokens:
            self.observe("iteration_tokens_total", tokens)

    def observe_failure(self, failure: Exception) -> None:
        """A request that ended without its answer: an ApiError, or the client has gone."""
        if isinstance(failure, ApiError):
            self.rejected[str(failure.status), failure.code or ""] += 1
        else:
            self.disconnects += 1

    def collect(self) -> Iterator[Metric]:
        self.observe_engine(self.client.stats)
        families = list(self._families())
        yield from families
        if self.vllm_names:
            yield from aliases(families, PREFIX)
            if self.client.info is not None:
                yield cache_config(self.client.info, self.labels)

    def _families(self) -> Iterator[Metric]:
        stats = self.engine.total()
        yield from self._gauges(stats)
        for name, (help_text, field) in ENGINE_COUNTERS.items():
            yield self._counter(name, help_text, {(): getattr(stats, field)})
        for name, (help_text, label, field) in ENGINE_TABLES.items():
            yield self._counter(name, help_text, {(key,): n for key, n in getattr(stats, field).items()}, label)
        positions: Values = {(str(i),): n for i, n in enumerate(stats.num_accepted_tokens_per_pos)}
        name, help_text = "spec_decode_num_accepted_tokens_per_pos", "Draft nodes accepted, by depth in the draft (0 = first)"
        yield self._counter(name, help_text, positions, "position")
        rejected = stats.num_draft_tokens - stats.num_accepted_tokens
        yield self._counter("spec_decode_num_rejected_tokens", "Draft nodes shown to the model and rejected", {(): rejected})
        yield from self._own_counters()
        for histogram in self.histograms.values():
            yield histogram.family(self.labels)

    def _gauges(self, stats: EngineStats) -> Iterator[Metric]:
        used = stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0
        for name, (help_text, field) in ENGINE_GAUGES.items():
            yield self._gauge(name, help_text, getattr(stats, field))
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use; 1 = all", used)
        help_text = "Seconds that the work which waits will take, at the rate of recent steps"
        yield self._gauge("queued_work_seconds", help_text, self.queued_work.seconds)
        yield self._gauge("requests_in_flight", "Requests between acceptance and last byte", self.admission.in_flight)
        yield self._gauge("engine_ready", "1 while the engine can work on requests", int(self.client.ready))

    def _own_counters(self) -> Iterator[Metric]:
        finished: Values = {(reason,): n for reason, n in self.finished.items()}
        yield self._counter("request_success", "Finished sequences, by reason", finished, "finished_reason")
        help_text = "Requests answered with an error, by HTTP status and error code"
        yield self._counter("rejected_requests", help_text, self.rejected, "status", "code")
        yield self._counter("client_disconnects", "Requests whose client left before the end", {(): self.disconnects})
        yield self._counter("engine_restarts", "Times the engine process was started again", {(): self.client.restarts})

    def _gauge(self, name: str, help_text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, help_text, labels=list(self.labels))
        family.add_metric(list(self.labels.values()), value)
        return family

    def _counter(self, name: str, help_text: str, values: Values, *labels: str) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help_text, labels=[*self.labels, *labels])
        for key, value in values.items():
            family.add_metric([*self.labels.values(), *key], value)
        return family
