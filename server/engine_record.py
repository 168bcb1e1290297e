"""What the front end has recorded of one engine, for /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.messages import EngineStats
from server.engine_counters import EngineCounters
from server.histogram import Histogram
from server.queued_work import QueuedWork

if TYPE_CHECKING:
    from server.client import EngineClient


class EngineRecord:
    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.counters = EngineCounters()
        self.queued_work = QueuedWork()
        self._seen: EngineStats | None = None

    def update(self, stats: EngineStats, answers: Histogram) -> bool:
        """False for a message seen before. `answers`: the lengths of finished sequences."""
        if stats is self._seen:
            return False
        self._seen = stats
        self.counters.update(stats, self.client.restarts)
        self.queued_work.update(stats, answers)
        return True
