"""Drafter `rest`: what followed this context in a text the operator chose follows it here.

REST: Retrieval-Based Speculative Decoding (arXiv 2311.08252). The longest run of last tokens, `longest` down to `shortest`, that
occurs in the datastore is looked up; its occurrences, at most `matches` of them sampled evenly, are continued for `depth` tokens;
the tree is their most frequent prefixes, as far as the budget reaches. The paper's numbers are 16, 2, 5000 and 10; ours differ in
`matches`, 500, because more of them took time and gave nothing (1.578 tokens per step with 100, 1.581 with 5000). The confidence
of a node is its share of its parent's occurrences, with `doubt` / (matched tokens) more counted that went another way: one
occurrence behind two tokens says little, behind sixteen much.

Replayed with budget 8 on written answers, the datastore built from the rest of the same collection and from other text (tokens
per step, accepted; `ngram` for comparison; 135M Llama tokenizer; bench/RESULTS.md):

                    same kind         other text        ngram
    tool calls      2.50  44%         1.11   5%         1.31  28%
    grade math      1.57  12%         1.13   5%         1.47  27%
    HumanEval       1.31  11%         1.02   4%         1.15  17%

Unlike the authors' code it keeps ids of any size, never drafts without a match, and is verified with one target token per node
(theirs draws one per path, which changes the answers). It is not a cache: nothing a request says enters the datastore, so tenants
share it without learning from each other. It only pays where the datastore's text is like the answers.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path

from engine.continuations import most_frequent
from engine.datastore import Datastore
from engine.growth import NO_BRANCHES, Branches, forest_of
from engine.protocols import NO_SIGNALS, Observed, Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict


class RestDrafter:
    """datastore: a file that `outrider datastore build` wrote. floor: prefixes that stand with less than this are left out.

    Raises ValueError, one line fit for the operator, for a datastore that is missing, broken or built for another vocabulary, and
    for numbers that make no sense; OSError for one that cannot be read.
    """

    name = "rest"
    needs = NO_SIGNALS
    siblings = Siblings.POINT

    def __init__(
        self,
        datastore: str | Path | Datastore | None = None,
        vocab_size: int | None = None,
        *,
        longest: int = 16,
        shortest: int = 2,
        depth: int = 10,
        matches: int = 500,
        doubt: float = 4.0,
        floor: float = 0.05,
    ) -> None:
        if datastore is None:
            raise ValueError("drafter rest needs a datastore (--datastore FILE; outrider datastore build makes one)")
        if not 1 <= shortest <= longest or depth < 1 or matches < 1 or doubt < 0:
            raise ValueError("rest needs 1 <= shortest <= longest, depth >= 1, matches >= 1 and doubt >= 0")
        self.datastore = datastore if isinstance(datastore, Datastore) else Datastore(datastore, vocab_size)
        self.longest, self.shortest, self.depth = longest, shortest, depth
        self.matches, self.doubt, self.floor = matches, doubt, floor

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        branches = [self._branches(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        return forest_of([seq.tokens[-1] for seq in seqs], branches, self.name)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """The committed tokens are all it looks at; `draft` reads them."""

    def forget(self, seq_id: int) -> None:
        """Nothing is kept for a sequence."""

    def _branches(self, seq: Sequence, budget: int) -> Branches:
        if budget < 1:
            return NO_BRANCHES
        found = self.datastore.find(seq.tokens, self.longest, self.shortest)
        if not found.length:
            return NO_BRANCHES
        rows = self.datastore.continuations(found, self.depth, self.matches)
        return most_frequent(rows, budget, doubt=self.doubt / found.length, floor=self.floor)
