"""Drafting that cannot hurt: whatever a drafter does, the step gets a well-formed forest within its budgets."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np

from engine.protocols import NO_SIGNALS, Drafter, Observed, Signals
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

logger = logging.getLogger(__name__)


class Drafting:
    """Runs the configured drafters in order; a sequence takes the first tree that is more than a root.

    A drafter that raises, answers with the wrong shape, roots or sizes, or with ids outside the vocabulary costs its
    guess for this step, not the request; the reason is counted. (The target law and the verdict never depend on it.)
    """

    def __init__(self, drafters: Seq[Drafter], vocab_size: int) -> None:
        self.drafters, self.vocab_size = list(drafters), vocab_size
        self.needs = _union([d.needs for d in self.drafters])
        self._fallbacks: Counter[str] = Counter()

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        """One tree per sequence, rooted at its last committed token, at most budgets[b] nodes below the root."""
        roots = [seq.tokens[-1] for seq in seqs]
        open_ = [b for b, budget in enumerate(budgets) if budget > 0]
        trees: dict[int, tuple[list[int], list[int], str]] = {}
        for drafter in self.drafters:
            if not open_:
                break
            asked = [seqs[b] for b in open_]
            forest = self._ask(drafter, asked, [budgets[b] for b in open_])
            if forest is None:
                continue
            for i, b in enumerate(open_):
                if forest.size(i) > 1:
                    part = forest.nodes(i)
                    trees[b] = (forest.token[part].tolist(), forest.parent[part].tolist(), drafter.name)
            open_ = [b for b in open_ if b not in trees]
        if not trees:
            return DraftForest.roots(roots)
        bare: tuple[list[int], list[int], str]
        chosen = []
        for b, root in enumerate(roots):
            bare = ([root], [-1], "")
            chosen.append(trees.get(b, bare))
        return DraftForest.from_parents([(tokens, parents) for tokens, parents, _ in chosen], [name for _, _, name in chosen])

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        for drafter in self.drafters:
            try:
                drafter.observe(seqs, forest, verdict, signals)
            except Exception:
                self._failed(drafter, "raised")

    def forget(self, seq_id: int) -> None:
        for drafter in self.drafters:
            try:
                drafter.forget(seq_id)
            except Exception:
                self._failed(drafter, "raised")

    def take_fallbacks(self) -> dict[str, int]:
        """Fallbacks since the last call, by reason: raised, malformed, vocabulary."""
        taken = dict(self._fallbacks)
        self._fallbacks.clear()
        return taken

    def _ask(self, drafter: Drafter, seqs: list[Sequence], budgets: list[int]) -> DraftForest | None:
        try:
            forest = drafter.draft(seqs, budgets)
            reason = self._fault(forest, seqs, budgets)
        except Exception:
            self._failed(drafter, "raised")
            return None
        if reason:
            self._fallbacks[reason] += 1
            return None
        return forest

    def _fault(self, forest: DraftForest, seqs: list[Sequence], budgets: list[int]) -> str | None:
        sizes = np.diff(forest.start)
        if len(sizes) != len(seqs) or (sizes < 1).any() or (sizes - 1 > budgets).any():
            return "malformed"
        if len(forest.token) != forest.num_nodes or len(forest.parent) != forest.num_nodes:
            return "malformed"
        if (forest.token[forest.start[:-1]] != [seq.tokens[-1] for seq in seqs]).any():
            return "malformed"
        if (forest.token < 0).any() or (forest.token >= self.vocab_size).any():
            return "vocabulary"
        local = np.arange(forest.num_nodes) - np.repeat(forest.start[:-1], sizes)
        below = local > 0
        if (forest.parent[below] < 0).any() or (forest.parent[below] >= local[below]).any():
            return "malformed"
        return None

    def _failed(self, drafter: Drafter, reason: str) -> None:
        self._fallbacks[reason] += 1
        logger.exception("drafter %s failed; this step goes on without it", drafter.name)


def _union(needs: list[Signals]) -> Signals:
    if not needs:
        return NO_SIGNALS
    return Signals(
        top_k=max(n.top_k for n in needs),
        hidden_layers=tuple(sorted({layer for n in needs for layer in n.hidden_layers})),
        probabilities=any(n.probabilities for n in needs),
    )
