"""The engine's cumulative counters, continued over engine restarts: what an operator sees never goes backwards."""

from __future__ import annotations

from itertools import zip_longest

from msgspec import structs

from engine.messages import EngineStats

NUMBERS = (
    "steps",
    "prompt_tokens",
    "generation_tokens",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "preemptions",
    "num_drafts",
    "num_draft_tokens",
    "num_accepted_tokens",
    "num_dropped_tokens",
    "predicted_tokens",
    "predicted_seconds",
    "decided_tokens",
    "decided_seconds",
    "corrupted_requests",
    "looping_sequences",
    "seconds_draft",
    "seconds_forward",
    "seconds_target_law",
    "seconds_verify",
    "seconds_commit",
    "seconds_step",
)
TABLES = (
    "draft_tokens_by_drafter",
    "accepted_tokens_by_drafter",
    "drafts_by_drafter",
    "seconds_draft_by_drafter",
    "drafter_fallbacks",
)


class EngineCounters:
    """Sums over all engines that have lived. A new one starts at zero."""

    def __init__(self) -> None:
        self.latest = EngineStats()
        self._before = EngineStats()
        self._life = 0

    def update(self, stats: EngineStats, life: int) -> None:
        """`life` counts restarts. A counter that fell tells as well: between two lives the client shows zeros."""
        if life != self._life or any(getattr(stats, name) < getattr(self.latest, name) for name in NUMBERS):
            self._before, self._life = self.total(), life
        self.latest = stats

    def total(self) -> EngineStats:
        """The latest message, with what earlier engines had reached added to every counter."""
        before, latest = self._before, self.latest
        total = structs.replace(latest, draft_nodes=[], draft_depths=[], iteration_tokens=[])
        for name in NUMBERS:
            setattr(total, name, getattr(before, name) + getattr(latest, name))
        for name in TABLES:
            setattr(total, name, _merge(getattr(before, name), getattr(latest, name)))
        positions = zip_longest(before.num_accepted_tokens_per_pos, latest.num_accepted_tokens_per_pos, fillvalue=0)
        total.num_accepted_tokens_per_pos = [one + other for one, other in positions]
        return total


def _merge(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in one | other}
