"""Policy `fixed`: the same number of draft nodes for every sequence at every step, whatever it costs.

It is not a controller: it neither looks at the load nor at what was accepted. The scheduler still cuts a budget to what
a sequence can use and shares out what the step has room for.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.protocols import Load, Policy
from engine.sequence import Sequence


class FixedPolicy(Policy):
    """`budget` draft nodes for everyone."""

    name = "fixed"

    def __init__(self, budget: int = 8, **_: object) -> None:
        """Takes what every policy is told, and uses `budget`. Raises ValueError for a negative budget."""
        if budget < 0:
            raise ValueError(f"budget: must not be negative, got {budget}")
        self.budget = budget

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]:
        return [self.budget] * len(seqs)
