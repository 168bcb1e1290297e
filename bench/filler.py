"""A drafter for measurements alone: it always guesses as far as it may, and nearly always wrong. Not for a server."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from engine.protocols import NO_SIGNALS, Observed, Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict


class FillerDrafter:
    """Repeats the first token of the prompt: a step then has exactly the nodes that the budget asks for."""

    name = "filler"
    needs = NO_SIGNALS
    siblings = Siblings.POINT

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        chains = [[seq.tokens[0]] * budget for seq, budget in zip(seqs, budgets, strict=True)]
        return DraftForest.from_chains([seq.tokens[-1] for seq in seqs], chains, [self.name] * len(seqs))

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        pass

    def forget(self, seq_id: int) -> None:
        pass
