"""Counts what the engine did, in the form in which the HTTP process exports it."""

from __future__ import annotations

from collections import deque

import msgspec

from engine.messages import EngineStats
from engine.plan import RowResult, StepResult

MAX_OBSERVATIONS = 65_536  # per list, should nobody ask for a long time


class StatsRecorder:
    """Cumulative counters since the start, and observations since they were last taken."""

    def __init__(self) -> None:
        self.totals = EngineStats()
        self._draft_nodes: deque[int] = deque(maxlen=MAX_OBSERVATIONS)
        self._iteration_tokens: deque[int] = deque(maxlen=MAX_OBSERVATIONS)

    def prefix_lookup(self, num_tokens: int, num_found: int) -> None:
        self.totals.prefix_cache_queries += num_tokens
        self.totals.prefix_cache_hits += num_found

    def verdict(self, row: RowResult, kept: int, accepted: int) -> None:
        """A judged row: `kept` tokens were committed, `accepted` of them draft nodes."""
        totals = self.totals
        totals.generation_tokens += kept
        if not row.num_draft:
            return
        totals.num_drafts += 1
        totals.num_draft_tokens += row.num_draft
        totals.num_accepted_tokens += accepted
        per_position = totals.num_accepted_tokens_per_pos
        per_position.extend([0] * (accepted - len(per_position)))
        for depth in range(accepted):
            per_position[depth] += 1
        drafted, stood, name = totals.draft_tokens_by_drafter, totals.accepted_tokens_by_drafter, row.drafter
        drafted[name] = drafted.get(name, 0) + row.num_draft
        stood[name] = stood.get(name, 0) + accepted

    def step(self, result: StepResult, seconds: float) -> None:
        totals, times = self.totals, result.times
        totals.steps += 1
        totals.seconds_draft += times.draft
        totals.seconds_forward += times.forward
        totals.seconds_target_law += times.target_law
        totals.seconds_verify += times.verify
        totals.seconds_commit += times.commit
        totals.seconds_step += seconds
        for reason, count in result.fallbacks.items():
            totals.drafter_fallbacks[reason] = totals.drafter_fallbacks.get(reason, 0) + count
        self._draft_nodes.append(sum(row.num_draft for row in result.rows))
        self._iteration_tokens.append(result.num_forward_tokens)

    def take(self, *, running: int, waiting: int, blocks_used: int, blocks_total: int) -> EngineStats:
        """A copy of everything, with these gauges; the observations start anew."""
        totals = self.totals
        snapshot = msgspec.structs.replace(
            totals,
            running=running,
            waiting=waiting,
            blocks_used=blocks_used,
            blocks_total=blocks_total,
            num_accepted_tokens_per_pos=totals.num_accepted_tokens_per_pos.copy(),
            draft_tokens_by_drafter=totals.draft_tokens_by_drafter.copy(),
            accepted_tokens_by_drafter=totals.accepted_tokens_by_drafter.copy(),
            drafter_fallbacks=totals.drafter_fallbacks.copy(),
            draft_nodes=list(self._draft_nodes),
            iteration_tokens=list(self._iteration_tokens),
        )
        self._draft_nodes.clear()
        self._iteration_tokens.clear()
        return snapshot
