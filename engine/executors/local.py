"""One worker in this process: all of the model, or rank 0 of it."""

from __future__ import annotations

import torch

from engine import machine
from engine.config import EngineConfig
from engine.parallel import ALONE, Group
from engine.plan import StepPlan, StepResult
from engine.probe import Probe, run_probe
from engine.protocols import Policy
from engine.successors import Successors
from engine.worker import Worker
from kernels.cpu.build import digest


class LocalExecutor:
    """Runs each step where it was planned."""

    def __init__(self, config: EngineConfig, group: Group = ALONE, device: torch.device | None = None) -> None:
        self._worker = Worker(config, group, device)
        self.info = self._worker.info

    def guide(self, policy: Policy) -> None:
        self._worker.guide(policy)

    def execute(self, plan: StepPlan) -> StepResult:
        return self._worker.step(plan)

    def platform(self) -> dict[str, str]:
        own = {"kernels": digest()} if self.info.backend == "native" else {}
        return machine.describe(self._worker.device) | own

    def tier(self, tokens: int) -> int:
        return self._worker.runner.tier(tokens)

    def probe(self, probe: Probe) -> float:
        return run_probe(self._worker, probe)

    @property
    def successors(self) -> Successors | None:
        return self._worker.successors

    def study(self) -> bool:
        return self._worker.study()

    def close(self) -> None:
        self._worker.close()
