"""Policy `off`: never guess. Plain decoding, a forest of roots."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.protocols import Load, Policy
from engine.sequence import Sequence


class OffPolicy(Policy):
    """Budget 0 for everyone."""

    name = "off"

    def __init__(self, **_: object) -> None:
        """What every policy is told; this one has no use for it."""

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]:
        return [0] * len(seqs)
