"""Verifier `optimal`: the greedy draft and its verification, which accepts as much as any rule could from such children.

The children of a node are the n - 1 likeliest tokens of q and one drawn from q', the rest of q. One step of speculative
sampling with q' decides the token: the drawn child stands with probability min(1, p / q'), else the token comes from
norm(max(p - q', 0)), in which the likeliest are found. Hu et al., "Towards Optimal Multi-draft Speculative Decoding", arXiv
2502.18779. It accepts P(likeliest) + sum over the others of min(p, q'), which is the optimal transport's value for these
children (engine/acceptance.py), with one coin and one draw per node.

Drafts of another kind are refused: it would be exact for them, and no better than recursive rejection.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from torch import Tensor

from engine.child_law import Drawn, residual
from engine.gumbel_max import UNUSABLE, gumbel_argmax
from engine.protocols import Siblings
from engine.ruling import Coin, Kinds, RuledTree, Ruling, addressed_coin, verdict
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw


class OptimalVerifier:
    name = "optimal"
    accepts = frozenset({Siblings.POINT, Siblings.GREEDY})
    lossless = True
    anticipates = False

    def __init__(self, siblings: Kinds, coin: Coin = addressed_coin, draw: Draw = gumbel_argmax) -> None:
        self._siblings, self._coin, self._draw = siblings, coin, draw

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
        return verdict(forest, scores, seqs, self._siblings, self._judge, self._draw)

    def _judge(self, tree: RuledTree) -> Ruling:
        node, depth = 0, 0
        while tree.children[node] and tree.p(node) is not None:
            token = self._token(tree, node, depth)
            below = [child for child in tree.children[node] if tree.token[child] == token]
            if not below:
                return Ruling(node, token=token)
            node, depth = below[0], depth + 1
        return Ruling(node)

    def _token(self, tree: RuledTree, node: int, depth: int) -> int:
        """The token behind a node, whether a child carries it or not."""
        law = tree.p(node)
        assert law is not None
        for child, own in tree.laws(node):
            if isinstance(own, Drawn):
                token = tree.token[child]
                if self._coin(tree.seq, child) * own.of(token) < float(law[token]):
                    return token
                law = residual(law, own)
        token = self._draw(law.log().unsqueeze(0), [0], [tree.address(depth)])[0]
        return token if token != UNUSABLE else int(law.argmax())
