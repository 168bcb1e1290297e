"""What /metrics exports: names and meanings. Where vLLM has the metric, the name after the prefix is vLLM's.

Every metric has the label `model_name`, and where a server has several engines, what is told of one has the label `engine`, its
number. Counters are exported with the suffix `_total`. A "sequence" is one choice of an
answer: a request with n = 4 has four. Times are seconds on this machine's monotonic clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.messages import EngineStats
from server.engine_record import EngineRecord
from server.histogram import Histogram
from server.metric_aliases import aliases, cache_config
from server.openai.errors import ApiError

if TYPE_CHECKING:
    from server.admission import Admission
    from server.fleet import Fleet
    from server.router import Route

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

# (status, code) there from the start: what appears with its first increase has no increase that Prometheus could see.
REFUSALS = (("429", "server_overloaded"), ("500", "internal_error"), ("503", "engine_unavailable"))

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
# name -> (meaning, attribute of Route); where there are several engines
ROUTE_COUNTERS: dict[str, tuple[str, str]] = {
    "routed_requests": ("Prompts sent to the engine", "requests"),
    "routed_prompt_tokens": ("Tokens of these prompts", "prompt_tokens"),
    "routed_matched_tokens": ("Tokens of these prompts whose KV the engine was believed to have", "matched_tokens"),
}


class Metrics(Collector):
    """The counters of one app, in its own registry."""

    def __init__(self, model: str, fleet: Fleet, admission: Admission, *, vllm_names: bool = False) -> None:
        self.labels = {"model_name": model}
        self.engines = [EngineRecord(engine) for engine in fleet.engines]
        self.numbers = ("engine",) if len(self.engines) > 1 else ()
        self.routes: list[Route] = fleet.router.routes if self.numbers else []
        self.admission = admission
        self.vllm_names = vllm_names
        self.histograms = {name: Histogram(PREFIX + name, help_text, b) for name, (help_text, b) in HISTOGRAMS.items()}
        self.finished: Counter[str] = Counter({"stop": 0, "length": 0, "abort": 0, "error": 0})
        self.rejected: Counter[tuple[str, ...]] = Counter(dict.fromkeys(REFUSALS, 0))
        self.disconnects = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

    def observe(self, name: str, value: float, count: int = 1) -> None:
        self.histograms[name].observe(value, count)

    def observe_engine(self, number: int, stats: EngineStats) -> None:
        """Called with each message of an engine; a message seen before changes nothing."""
        if not self.engines[number].update(stats, self.histograms["request_generation_tokens"]):
            return
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
        for number, engine in enumerate(self.engines):
            self.observe_engine(number, engine.client.stats)
        families = list(self._families())
        yield from families
        if self.vllm_names:
            yield from aliases(families, PREFIX)
            yield cache_config([engine.client.info for engine in self.engines], self.labels)

    def _families(self) -> Iterator[Metric]:
        each = [engine.counters.total() for engine in self.engines]
        yield from self._gauges(each)
        for name, (help_text, field) in ENGINE_COUNTERS.items():
            yield self._engine_counter(name, help_text, [{(): getattr(stats, field)} for stats in each])
        for name, (help_text, label, field) in ENGINE_TABLES.items():
            tables: list[Values] = [{(key,): n for key, n in getattr(stats, field).items()} for stats in each]
            yield self._engine_counter(name, help_text, tables, label)
        positions: list[Values] = [{(str(i),): n for i, n in enumerate(stats.num_accepted_tokens_per_pos)} for stats in each]
        name, help_text = "spec_decode_num_accepted_tokens_per_pos", "Draft nodes accepted, by depth in the draft (0 = first)"
        yield self._engine_counter(name, help_text, positions, "position")
        rejected: list[Values] = [{(): stats.num_draft_tokens - stats.num_accepted_tokens} for stats in each]
        yield self._engine_counter("spec_decode_num_rejected_tokens", "Draft nodes shown to the model and rejected", rejected)
        yield from self._own_counters()
        help_text = "Times the engine process was started again"
        yield self._engine_counter("engine_restarts", help_text, [{(): engine.client.restarts} for engine in self.engines])
        if self.routes:
            yield from self._routed()
        for histogram in self.histograms.values():
            yield histogram.family(self.labels)

    def _gauges(self, each: list[EngineStats]) -> Iterator[Metric]:
        for name, (help_text, field) in ENGINE_GAUGES.items():
            yield self._engine_gauge(name, help_text, [getattr(stats, field) for stats in each])
        used = [stats.blocks_used / stats.blocks_total if stats.blocks_total else 0.0 for stats in each]
        yield self._engine_gauge("kv_cache_usage_perc", "Share of KV blocks in use; 1 = all", used)
        help_text = "Seconds that the work which waits will take, at the rate of recent steps"
        yield self._engine_gauge("queued_work_seconds", help_text, [engine.queued_work.seconds for engine in self.engines])
        help_text = "Requests between acceptance and last byte"
        yield self._family(GaugeMetricFamily, "requests_in_flight", help_text, {(): self.admission.in_flight})
        ready = [int(engine.client.ready) for engine in self.engines]
        yield self._engine_gauge("engine_ready", "1 while the engine can work on requests", ready)

    def _own_counters(self) -> Iterator[Metric]:
        finished: Values = {(reason,): n for reason, n in self.finished.items()}
        yield self._counter("request_success", "Finished sequences, by reason", finished, "finished_reason")
        help_text = "Requests answered with an error, by HTTP status and error code"
        yield self._counter("rejected_requests", help_text, self.rejected, "status", "code")
        yield self._counter("client_disconnects", "Requests whose client left before the end", {(): self.disconnects})

    def _routed(self) -> Iterator[Metric]:
        for name, (help_text, field) in ROUTE_COUNTERS.items():
            yield self._engine_counter(name, help_text, [{(): getattr(route, field)} for route in self.routes])
        help_text = "Tokens that the engine still has to compute, by the router's estimate"
        yield self._engine_gauge("routed_owed_tokens", help_text, [route.owed for route in self.routes])

    def _engine_gauge(self, name: str, help_text: str, each: Iterable[float]) -> Metric:
        return self._family(GaugeMetricFamily, name, help_text, self._numbered({(): n} for n in each), *self.numbers)

    def _engine_counter(self, name: str, help_text: str, each: Iterable[Values], *labels: str) -> Metric:
        return self._counter(name, help_text, self._numbered(each), *self.numbers, *labels)

    def _numbered(self, each: Iterable[Values]) -> Values:
        """The values of a single engine as they are, those of several under their numbers."""
        if not self.numbers:
            return next(iter(each))
        return {(str(number), *key): value for number, values in enumerate(each) for key, value in values.items()}

    def _counter(self, name: str, help_text: str, values: Values, *labels: str) -> Metric:
        return self._family(CounterMetricFamily, name, help_text, values, *labels)

    def _family(
        self,
        kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
        name: str,
        help_text: str,
        values: Values,
        *labels: str,
    ) -> Metric:
        family = kind(PREFIX + name, help_text, labels=[*self.labels, *labels])
        for key, value in values.items():
            family.add_metric([*self.labels.values(), *key], value)
        return family
