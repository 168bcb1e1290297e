"""Policy `off`: never guess. Plain decoding, a forest of roots."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.plan import StepPlan, StepResult
from engine.protocols import Load
from engine.sequence import Sequence
from engine.tree import DraftForest


class OffPolicy:
    """Budget 0 for everyone."""

    name = "off"

    def __init__(self, budget: int = 0) -> None:
        """`budget` is what every policy is told; this one has no use for it."""

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]:
        return [0] * len(seqs)

    def trim(self, forest: DraftForest) -> DraftForest:
        return forest

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        pass
