"""Verifier `rejection`: speculative sampling of a chain.

A drafted token x, drawn from q, stands with probability min(1, p(x) / q(x)); the token after the first rejection is drawn
from norm(max(p - q, 0)). Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", arXiv
2211.17192; Chen et al., arXiv 2302.01318.

It is a rule for chains: of sampled children of a node it judges the first, and the others are lost on it. Deterministic
children are judged one after the other.
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


class RejectionVerifier:
    name = "rejection"
    accepts = frozenset({Siblings.POINT, Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY})
    lossless = True
    anticipates = False
    chains_only = True

    def __init__(self, siblings: Kinds, coin: Coin = addressed_coin, draw: Draw = gumbel_argmax) -> None:
        self._siblings, self._coin, self._draw = siblings, coin, draw

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        if self._coin is addressed_coin and self._draw is gumbel_argmax and has_kernels(scores.device):
            return recursive_verdict(forest, scores, seqs, self._siblings, 1)
        return verdict(forest, scores, seqs, self._siblings, self._judge, self._draw)

    def _judge(self, tree: RuledTree) -> Ruling:
        return recurse(tree, self._coin, most_sampled=1)
