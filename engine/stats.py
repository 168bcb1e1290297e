"""Counts what the engine did, in the form in which the HTTP process exports it."""

from __future__ import annotations

from collections import deque
from typing import TypeVar

import msgspec

from engine.messages import EngineStats
from engine.plan import RowResult, StepResult
from engine.repetition import ends_in_a_loop
from engine.sequence import Sequence
from engine.usage import by_drafter, count_depths

MAX_OBSERVATIONS = 65_536  # per list, should nobody ask for a long time

Number = TypeVar("Number", int, float)


class StatsRecorder:
    """Cumulative counters since the start, and observations since they were last taken."""

    def __init__(self) -> None:
        self.totals = EngineStats()
        self._draft_depths: deque[int] = deque(maxlen=MAX_OBSERVATIONS)
        self._draft_nodes: deque[int] = deque(maxlen=MAX_OBSERVATIONS)
        self._iteration_tokens: deque[int] = deque(maxlen=MAX_OBSERVATIONS)

    def prefix_lookup(self, num_tokens: int, num_found: int) -> None:
        self.totals.prefix_cache_queries += num_tokens
        self.totals.prefix_cache_hits += num_found

    def verdict(self, row: RowResult, kept: int, accepted: int) -> None:
        """A judged row: `kept` tokens were committed, `accepted` of them draft nodes."""
        totals = self.totals
        totals.generation_tokens += kept
        totals.num_dropped_tokens += row.num_dropped
        if not row.num_draft:
            return
        totals.num_drafts += 1
        totals.num_draft_tokens += row.num_draft
        totals.num_accepted_tokens += accepted
        count_depths(totals.num_accepted_tokens_per_pos, accepted)
        drafted, stood = by_drafter(row, accepted)
        _add(totals.draft_tokens_by_drafter, drafted)
        _add(totals.accepted_tokens_by_drafter, {name: stood.get(name, 0) for name in drafted})
        _add(totals.drafts_by_drafter, dict.fromkeys(drafted, 1))

    def finished(self, seq: Sequence) -> None:
        """A sequence that was committed to its end."""
        self.totals.looping_sequences += ends_in_a_loop(seq.tokens[seq.num_prompt :])

    def step(self, result: StepResult, seconds: float) -> None:
        totals, times = self.totals, result.times
        totals.steps += 1
        totals.seconds_draft += times.draft
        totals.seconds_forward += times.forward
        totals.seconds_target_law += times.target_law
        totals.seconds_verify += times.verify
        totals.seconds_commit += times.commit
        totals.seconds_step += seconds
        _add(totals.drafter_fallbacks, result.fallbacks)
        _add(totals.seconds_draft_by_drafter, result.draft_seconds)
        if result.predicted_seconds:
            totals.predicted_tokens += result.predicted_tokens
            totals.predicted_seconds += result.predicted_seconds
            totals.decided_tokens += sum(len(row.token_ids) for row in result.rows)
            totals.decided_seconds += seconds
        self._draft_depths.append(max((row.depth for row in result.rows), default=0))
        self._draft_nodes.append(sum(row.num_draft for row in result.rows))
        self._iteration_tokens.append(result.num_forward_tokens)

    def take(
        self,
        *,
        running: int,
        waiting: int,
        blocks_used: int,
        blocks_total: int,
        uncomputed_tokens: int = 0,
        calibration_error: float = 0.0,
        cost_error: float = 0.0,
    ) -> EngineStats:
        """A copy of everything, with these gauges; the observations start anew."""
        totals = self.totals
        snapshot = msgspec.structs.replace(
            totals,
            running=running,
            waiting=waiting,
            blocks_used=blocks_used,
            blocks_total=blocks_total,
            uncomputed_tokens=uncomputed_tokens,
            calibration_error=calibration_error,
            cost_error=cost_error,
            num_accepted_tokens_per_pos=totals.num_accepted_tokens_per_pos.copy(),
            draft_tokens_by_drafter=totals.draft_tokens_by_drafter.copy(),
            accepted_tokens_by_drafter=totals.accepted_tokens_by_drafter.copy(),
            drafter_fallbacks=totals.drafter_fallbacks.copy(),
            drafts_by_drafter=totals.drafts_by_drafter.copy(),
            seconds_draft_by_drafter=totals.seconds_draft_by_drafter.copy(),
            draft_depths=list(self._draft_depths),
            draft_nodes=list(self._draft_nodes),
            iteration_tokens=list(self._iteration_tokens),
        )
        self._draft_depths.clear()
        self._draft_nodes.clear()
        self._iteration_tokens.clear()
        return snapshot


def _add(totals: dict[str, Number], more: dict[str, Number]) -> None:
    for name, count in more.items():
        totals[name] = totals.get(name, 0) + count
