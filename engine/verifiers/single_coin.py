"""Verifier `single_coin`: one coin per node decides among the children and none of them by the target's law alone.

Children are lined up on [0, 1) by their target probabilities; the coin falls on one, or behind all of them, and then the
token is drawn from the target's law without the children (SGLang's target-only tree sampling with both thresholds at 1,
`speculative_sampling.cuh`). In law this is "draw from p and see whether it is a child".

It is `match` with randomness of its own: exact for any drafter, tree and controller, coupled drafts included, but not the
tokens of plain decoding with the same seed, and coupled drafts gain it nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from engine.gumbel_max import gumbel_argmax
from engine.noise import RESIDUAL
from engine.protocols import Siblings
from engine.ruling import Coin, RuledTree, Ruling, addressed_coin, verdict
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw


class SingleCoinVerifier:
    name = "single_coin"
    accepts = frozenset(Siblings)
    lossless = True
    anticipates = True
    prefers = Siblings.POINT  # of model drafters: its coin knows nothing of the target's noise

    def __init__(self, coin: Coin = addressed_coin, draw: Draw = gumbel_argmax) -> None:
        self._coin, self._draw = coin, draw

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        # Drafts may have been chosen, or left out, by somebody who knows the target's noise: the last draw takes another.
        return verdict(forest, scores, seqs, {}, self._judge, self._draw, every_tree=True, stream=RESIDUAL)

    def _judge(self, tree: RuledTree) -> Ruling:
        node = 0
        while True:
            p = tree.p(node)
            children = {tree.token[c]: c for c in reversed(tree.children[node])}  # the first of twins
            if p is None or not children:
                return Ruling(node)
            child = self._falls_on(tree, node, p, children)
            if child is None:
                rest = p.clone()
                rest[list(children)] = 0
                return Ruling(node, rest if float(rest.sum()) > 0 else p)
            node = child

    def _falls_on(self, tree: RuledTree, node: int, p: Tensor, children: dict[int, int]) -> int | None:
        coin = self._coin(tree.seq, node)
        end = 0.0
        for child, probability in zip(children.values(), p[list(children)].tolist(), strict=True):
            end += probability
            if coin < end:
                return child
        return None
