"""Verifier `match`: the target speaks, the draft merely guessed.

At each node the target's own token is y = argmax(score + gumbel(seed, sample, position, .)), or the plain argmax for a greedy
request. If a child of the node carries y, descend; else y is the bonus token.

Coupled-Gumbel sampling (Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding",
arXiv 2408.07978), on trees. It never looks at the draft's law: exact for every drafter, tree and controller, and the
output is a function of (model, prompt, parameters, seed) alone. It is not rejection sampling: for a chain drawn
independently of the noise, that accepts more.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from engine.device_rules import has_kernels, match_verdict
from engine.gumbel_max import gumbel_argmax
from engine.protocols import Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw, match_walks


class MatchVerifier:
    """Exact for any tree. `draw` is where its randomness comes from; tests enumerate it."""

    name = "match"
    accepts = frozenset(Siblings)
    lossless = True
    anticipates = True

    def __init__(self, draw: Draw = gumbel_argmax) -> None:
        self._draw = draw

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        """The verdict on every tree; scores [M, V] in node order. Raises nothing for an unusable row: see `Verdict`."""
        if self._draw is gumbel_argmax and has_kernels(scores.device):
            return match_verdict(forest, scores, seqs)
        walks = match_walks(forest, scores, seqs, range(forest.num_trees), self._draw).values()
        return Verdict([walk.nodes for walk in walks], [walk.tokens for walk in walks])
