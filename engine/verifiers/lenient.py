"""Verifier `lenient`: speculative sampling that lets drafts through more easily. NOT lossless.

A draft stands with probability min(1, p(x) / (l q(x))) with lenience 0 < l <= 1; after a rejection the token is drawn from
norm(max(p - l q, 0)). At l = 1 it is recursive rejection and exact; below, answers drift towards the draft. Leviathan et al.,
arXiv 2211.17192 (appendix); Zhou et al., "DistillSpec", arXiv 2310.08461. Deterministic children are judged the same way,
with a one-hot law. Greedy requests are answered exactly.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from engine.gumbel_max import gumbel_argmax
from engine.protocols import Siblings
from engine.recursion import recurse
from engine.ruling import Coin, Kinds, RuledTree, Ruling, addressed_coin, verdict
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw


class LenientVerifier:
    """lenience: how much of its own law a draft is judged by. Raises ValueError outside (0, 1]."""

    name = "lenient"
    accepts = frozenset({Siblings.POINT, Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY})
    lossless = False
    anticipates = False  # or the laws would not reach it
    prefers = Siblings.IID  # of model drafters: it judges by the draft's law

    def __init__(self, siblings: Kinds, coin: Coin = addressed_coin, draw: Draw = gumbel_argmax, lenience: float = 0.7) -> None:
        if not 0 < lenience <= 1:
            raise ValueError(f"lenience must lie in (0, 1], not {lenience}")
        self._siblings, self._coin, self._draw, self._lenience = siblings, coin, draw, lenience

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        return verdict(forest, scores, seqs, self._siblings, self._judge, self._draw, every_tree=True)

    def _judge(self, tree: RuledTree) -> Ruling:
        return recurse(tree, self._coin, lenience=self._lenience)
