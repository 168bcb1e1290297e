"""Verifier `spectr`: K independent drafts at one position, judged with one threshold (K-SEQ).

Child x_j stands with probability min(1, p(x_j) / (rho q(x_j))), where rho in [1, K] is the least for which what the K trials
take from the target's law is never more than it has: 1 - (1 - b)^K = rho b with b = sum min(q, p / rho). Sun et al.,
"SpecTr: Fast Speculative Decoding via Optimal Transport", arXiv 2310.15141: at least 1 - 1/e of the best that any rule can
accept. Drafts that carry the accepted token survive together: what was drawn below them is the next set of independent
drafts.

It is not for draws without replacement. Deterministic children (also those of a greedy draft) come before it, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.child_law import Drawn, residual
from engine.gumbel_max import gumbel_argmax
from engine.protocols import Siblings
from engine.recursion import twins
from engine.ruling import Coin, Kinds, RuledTree, Ruling, addressed_coin, verdict
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw

BISECTIONS = 24  # any rho above the least is exact too: the upper end of the interval is taken


class SpectrVerifier:
    name = "spectr"
    accepts = frozenset({Siblings.POINT, Siblings.IID, Siblings.GREEDY})
    lossless = True
    anticipates = False

    def __init__(self, siblings: Kinds, coin: Coin = addressed_coin, draw: Draw = gumbel_argmax) -> None:
        self._siblings, self._coin, self._draw = siblings, coin, draw

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        return verdict(forest, scores, seqs, self._siblings, self._judge, self._draw)

    def _judge(self, tree: RuledTree) -> Ruling:
        group = [0]
        while True:
            accepted, law = self._children(tree, group)
            if accepted is None:
                return Ruling(group[0], law)
            group = twins(tree, group, accepted)

    def _children(self, tree: RuledTree, group: list[int]) -> tuple[int | None, Tensor | None]:
        """The child that stands, or none and the law of the token instead (None: the node's own row)."""
        p = tree.p(group[0])
        children = [pair for node in group for pair in tree.laws(node)]
        if p is None or not children:
            return None, None
        # Deterministic children of a fused tree come first: they do not depend on the draws.
        rest = p
        for child, law in children:
            if not isinstance(law, Drawn):
                if self._coin(tree.seq, child) * law.of(tree.token[child]) < float(rest[tree.token[child]]):
                    return child, None
                rest = residual(rest, law)
        drawn = [(child, law.law) for child, law in children if isinstance(law, Drawn)]
        if not drawn:
            return None, rest
        q = drawn[0][1]
        rho = threshold(rest, q, len(drawn))
        for child, _ in drawn:
            token = tree.token[child]
            if self._coin(tree.seq, child) * (rho * float(q[token])) < float(rest[token]):
                return child, None
        return None, _left(rest, q, rho, len(drawn))


def overlap(p: Tensor, q: Tensor, rho: float) -> float:
    """sum min(q, p / rho): the probability that one draft stands."""
    return float(torch.minimum(q, p / rho).sum())


def threshold(p: Tensor, q: Tensor, n: int) -> float:
    """The least rho in [1, n] that n independent drafts may be judged with, from above."""
    low, high = 1.0, float(n)
    for _ in range(BISECTIONS if n > 1 else 0):
        rho = (low + high) / 2
        b = overlap(p, q, rho)
        if 1 - (1 - b) ** n <= rho * b:
            high = rho
        else:
            low = rho
    return high


def _left(p: Tensor, q: Tensor, rho: float, n: int) -> Tensor:
    b = overlap(p, q, rho)
    if b <= 0:
        return p
    rest = (p - torch.minimum(q, p / rho) * ((1 - (1 - b) ** n) / b)).clamp(min=0)
    return rest if float(rest.sum()) > 0 else p
