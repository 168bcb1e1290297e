"""Drafter `none`: never guesses. Every tree is a bare root, so every step is plain decoding."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.protocols import NO_SIGNALS, Observed, Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict


class NoneDrafter:
    name = "none"
    needs = NO_SIGNALS
    siblings = Siblings.POINT

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        return DraftForest.roots([seq.tokens[-1] for seq in seqs])

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """Nothing to learn."""

    def forget(self, seq_id: int) -> None:
        """Nothing to forget."""
