"""When the tokens of an answer came: what the latency histograms are fed with."""

from __future__ import annotations

from engine.messages import SequenceUsage
from server.metrics import Metrics


class Timing:
    """One sequence's clock. Times are time.monotonic() seconds."""

    __slots__ = ("arrival", "first", "last", "metrics")

    def __init__(self, metrics: Metrics, arrival: float) -> None:
        self.metrics = metrics
        self.arrival = arrival
        self.first = 0.0
        self.last = 0.0

    def tokens(self, count: int, now: float) -> None:
        """`count` tokens came together."""
        if not count:
            return
        if not self.first:
            self.first = now
            self.metrics.observe("time_to_first_token_seconds", now - self.arrival)
        else:
            self.metrics.observe("inter_token_latency_seconds", (now - self.last) / count, count)
        self.last = now

    def finish(self, num_tokens: int, usage: SequenceUsage | None, now: float) -> None:
        observe = self.metrics.observe
        observe("e2e_request_latency_seconds", now - self.arrival)
        observe("request_generation_tokens", num_tokens)
        if self.first:
            observe("request_decode_time_seconds", self.last - self.first)
            if num_tokens > 1:
                observe("request_time_per_output_token_seconds", (self.last - self.first) / (num_tokens - 1))
        if usage is None:
            return
        observe("request_num_preemptions", usage.preemptions)
        if usage.drafted_tokens:
            observe("spec_decode_sequence_acceptance", usage.accepted_tokens / usage.drafted_tokens)
        if start := usage.first_scheduled_time:
            observe("request_queue_time_seconds", max(start - self.arrival, 0.0))
            observe("request_inference_time_seconds", max(now - start, 0.0))
            if self.first:
                observe("request_prefill_time_seconds", max(self.first - start, 0.0))
