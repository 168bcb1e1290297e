"""Policy `fixed`: the same number of draft nodes for every sequence at every step, whatever it costs.

It is not a controller: it neither looks at the load nor at what was accepted. The scheduler still cuts a budget to what
a sequence can use and shares out what the step has room for.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.plan import StepPlan, StepResult
from engine.protocols import Load
from engine.sequence import Sequence
from engine.tree import DraftForest


class FixedPolicy:
    """`budget` draft nodes for everyone."""

    name = "fixed"

    def __init__(self, budget: int = 8) -> None:
        """Raises ValueError for a negative budget."""
        if budget < 0:
            raise ValueError(f"budget: must not be negative, got {budget}")
        self.budget = budget

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]:
        return [self.budget] * len(seqs)

    def trim(self, forest: DraftForest) -> DraftForest:
        return forest

    def observe(self, plan: StepPlan, result: StepResult) -> None:
        pass
