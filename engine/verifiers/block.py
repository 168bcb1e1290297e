"""Verifier `block`: a chain is judged as a whole, and accepts at least as much as token by token.

A ratio p/q above 1 later in the chain can rescue one below 1 before it: the chain of length i is worth
b_i = min(1, b_{i-1} p(x_i) / q(x_i)), and each length has a coin; the longest that passes stands. Sun et al., "Block
Verification Accelerates Speculative Decoding", arXiv 2403.10444 (there optimal among the valid rules for chains).

It is a rule for chains: of several children of a node in a tree with sampled nodes it follows the first.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.child_law import EMPTY, ChildLaw, carried
from engine.gumbel_max import gumbel_argmax
from engine.protocols import Siblings
from engine.ruling import Coin, Kinds, RuledTree, Ruling, addressed_coin, verdict
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw


class BlockVerifier:
    name = "block"
    accepts = frozenset({Siblings.POINT, Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY})
    lossless = True
    anticipates = False
    chains_only = True

    def __init__(self, siblings: Kinds, coin: Coin = addressed_coin, draw: Draw = gumbel_argmax) -> None:
        self._siblings, self._coin, self._draw = siblings, coin, draw

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        return verdict(forest, scores, seqs, self._siblings, self._judge, self._draw)

    def _judge(self, tree: RuledTree) -> Ruling:
        chain, laws = _first_children(tree)
        if not laws:
            return Ruling(0)
        worth, rests = [1.0], []
        for node, child, law in zip(chain[:-1], chain[1:], laws, strict=True):
            p = tree.p(node)
            assert p is not None
            rests.append(law.below(worth[-1] * p))
            token = tree.token[child]
            worth.append(carried(worth[-1], float(p[token]), law.of(token)))
        mass = torch.stack([rest.sum() for rest in rests]).tolist()
        for i in range(len(laws), 0, -1):
            height = worth[i]
            if i < len(laws) and worth[i] < 1:
                height = mass[i] / (mass[i] + 1 - worth[i])
            if self._coin(tree.seq, chain[i]) < height:
                return Ruling(chain[i]) if i == len(laws) else Ruling(chain[i], _or_else(rests[i], mass[i], tree.p(chain[i])))
        return Ruling(0, _or_else(rests[0], mass[0], tree.p(0)))


def _first_children(tree: RuledTree) -> tuple[list[int], list[ChildLaw]]:
    """The chain of first children from the root, and the law of each; it ends at a node whose row is unusable."""
    chain, laws = [0], []
    while tree.children[chain[-1]] and tree.p(chain[-1]) is not None:
        child, law = next(tree.laws(chain[-1]))
        chain.append(child)
        laws.append(law)
    return chain, laws


def _or_else(rest: Tensor, mass: float, p: Tensor | None) -> Tensor | None:
    return rest if mass > EMPTY else p
