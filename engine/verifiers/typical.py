"""Verifier `typical`: a draft stands where the target finds it plausible enough. NOT lossless.

A token passes where p(x) > min(epsilon, delta exp(-H(p))), H the entropy of the target's law; the deepest node all of whose
path passes stands (ties: the likeliest path), and the token behind it is drawn from what passes there. Cai et al.,
"Medusa", arXiv 2401.10774, with its epsilon 0.09 and delta 0.3 = sqrt(epsilon). No coin is tossed for a draft, so
answers are less random than the request asked for. Greedy requests are answered exactly.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.gumbel_max import gumbel_argmax
from engine.protocols import Siblings
from engine.ruling import RuledTree, Ruling, verdict
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw


class TypicalVerifier:
    """Raises ValueError for an epsilon or delta outside (0, 1]."""

    name = "typical"
    accepts = frozenset(Siblings)
    lossless = False
    anticipates = True
    prefers = Siblings.POINT  # of model drafters

    def __init__(self, draw: Draw = gumbel_argmax, epsilon: float = 0.09, delta: float = 0.3) -> None:
        if not (0 < epsilon <= 1 and 0 < delta <= 1):
            raise ValueError(f"epsilon and delta must lie in (0, 1], not {epsilon} and {delta}")
        self._draw, self._epsilon, self._delta = draw, epsilon, delta

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        return verdict(forest, scores, seqs, {}, self._judge, self._draw, every_tree=True)

    def _judge(self, tree: RuledTree) -> Ruling:
        best, standing = (0, 0.0, 0), [(0, 0, 0.0)]  # (depth, log-probability of the path, node)
        while standing:
            node, depth, score = standing.pop()
            best = max(best, (depth, score, node))
            p = tree.p(node)
            if p is None or not tree.children[node]:
                continue
            tokens = [tree.token[child] for child in tree.children[node]]
            passing = self._passing(p)[tokens].tolist()
            gains = p[tokens].log().tolist()
            standing += [
                (child, depth + 1, score + gain)
                for child, passes, gain in zip(tree.children[node], passing, gains, strict=True)
                if passes
            ]
        node = best[2]
        p = tree.p(node)
        return Ruling(node, None if p is None else self._law(p))

    def _passing(self, p: Tensor) -> Tensor:
        return p > min(self._epsilon, self._delta * float(torch.exp(torch.special.entr(p).sum().neg())))

    def _law(self, p: Tensor) -> Tensor:
        """The target's law of what passes; its best token where nothing does."""
        kept = torch.where(self._passing(p), p, torch.zeros_like(p))
        if not bool(kept.any()):
            kept[p.argmax()] = 1
        return kept
