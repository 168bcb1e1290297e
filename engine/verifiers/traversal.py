"""Verifier `traversal`: a sampled tree is judged from its leaves to its root.

Block verification for trees: "Traversal Verification for Speculative Tree Decoding", arXiv 2505.12398. Depth first, children
in draw order; a leaf stands with its whole path or is taken away, and what it leaves (both of probability and of the law
behind its parent) is judged with the parent's next child, or with the parent itself once it has none.

The worth of a node is set when the walk first reaches it and afterwards only lowered by its children: computing it again
from its parent would be biased.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq

from torch import Tensor

from engine.child_law import EMPTY, ChildLaw, carried
from engine.gumbel_max import gumbel_argmax
from engine.protocols import Siblings
from engine.ruling import Coin, Kinds, RuledTree, Ruling, addressed_coin, verdict
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw


class TraversalVerifier:
    name = "traversal"
    accepts = frozenset({Siblings.POINT, Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY})
    lossless = True
    anticipates = False

    def __init__(self, siblings: Kinds, coin: Coin = addressed_coin, draw: Draw = gumbel_argmax) -> None:
        self._siblings, self._coin, self._draw = siblings, coin, draw

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        return verdict(forest, scores, seqs, self._siblings, self._judge, self._draw)

    def _judge(self, tree: RuledTree) -> Ruling:
        path = [_State(tree, 0, 1.0, None)]
        while True:
            here = path[-1]
            if (below := here.next_child()) is not None:
                path.append(below)
            elif len(path) == 1 or self._coin(tree.seq, here.node) < here.worth:
                return Ruling(here.node, here.law if here.lowered else None)
            else:
                path.pop()
                path[-1].lose(here)


class _State:
    """A node that has been reached: the probability that it stands, and the law behind it if it is where the path ends."""

    __slots__ = ("chosen_by", "law", "lowered", "node", "tree", "worth", "_left")

    def __init__(self, tree: RuledTree, node: int, worth: float, chosen_by: ChildLaw | None) -> None:
        self.tree, self.node, self.worth, self.chosen_by = tree, node, worth, chosen_by
        self.lowered = False
        self.law = tree.p(node) if worth > 0 else None  # a node that cannot stand takes its subtree with it
        self._left: Iterator[tuple[int, ChildLaw]] = iter(()) if self.law is None else tree.laws(node)

    def next_child(self) -> _State | None:
        for child, law in self._left:
            assert self.law is not None
            token = self.tree.token[child]
            worth = carried(self.worth, float(self.law[token]), law.of(token))
            return _State(self.tree, child, worth, law)
        return None

    def lose(self, child: _State) -> None:
        """Take a child away that did not stand."""
        assert self.law is not None and child.chosen_by is not None
        rest = child.chosen_by.below(self.worth * self.law)
        mass = float(rest.sum())
        if mass > EMPTY:
            self.law = rest / mass
            self.lowered = True
        if self.worth < 1:
            self.worth = mass / (mass + 1 - self.worth)
