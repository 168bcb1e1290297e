"""One worker in this process."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.plan import StepPlan, StepResult
from engine.worker import Worker


class LocalExecutor:
    """Runs each step where it was planned."""

    def __init__(self, config: EngineConfig) -> None:
        self._worker = Worker(config)
        self.info = self._worker.info

    def execute(self, plan: StepPlan) -> StepResult:
        return self._worker.step(plan)

    def close(self) -> None:
        self._worker.close()
