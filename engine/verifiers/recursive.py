"""Verifier `recursive`: recursive rejection over the children of a node, with or without replacement.

Children drawn without replacement (Gumbel top-k): Jeon et al., "Recursive Speculative Decoding", arXiv 2402.14160, the rule
of RSD-C (constant branching) and RSD-S (stochastic beam) alike; also Sequoia, arXiv 2402.12374. Independent children:
SpecInfer's multi-round sampling, arXiv 2305.09781. The trees are drawn by engine/draft_draws.py.

The law of each child is the one it was drawn from given its siblings, in draw order: a tree that was reranked or cut after
looking at sampled tokens is judged wrongly, and `anticipates` says so.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from engine.device_rules import has_kernels, recursive_verdict
from engine.gumbel_max import gumbel_argmax
from engine.protocols import Siblings
from engine.recursion import recurse
from engine.ruling import Coin, Kinds, RuledTree, Ruling, addressed_coin, verdict
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw


class RecursiveVerifier:
    name = "recursive"
    accepts = frozenset({Siblings.POINT, Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY})
    lossless = True
    anticipates = False

    def __init__(self, siblings: Kinds, coin: Coin = addressed_coin, draw: Draw = gumbel_argmax) -> None:
        self._siblings, self._coin, self._draw = siblings, coin, draw

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        if self._coin is addressed_coin and self._draw is gumbel_argmax and has_kernels(scores.device):
            return recursive_verdict(forest, scores, seqs, self._siblings)
        return verdict(forest, scores, seqs, self._siblings, self._judge, self._draw)

    def _judge(self, tree: RuledTree) -> Ruling:
        return recurse(tree, self._coin)
