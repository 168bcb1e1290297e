"""Verifier `match`: the target speaks, the draft merely guessed.

At each node the target's own token is y = argmax(score + gumbel(seed, sample, position, .)), or the plain argmax for a greedy
request. If a child of the node carries y, descend; else y is the bonus token.

Coupled-Gumbel sampling (Daliri, Musco, Suresh, "Coupling without Communication and Drafter-Invariant Speculative Decoding",
arXiv 2408.07978), on trees. It never looks at the draft's law: exact for every drafter, tree and controller, and the
output is a function of (model, prompt, parameters, seed) alone. It is not rejection sampling: for a chain drawn
independently of the noise, that accepts more.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

from torch import Tensor

from engine.gumbel_max import UNUSABLE, Address, first_argmax, gumbel_argmax
from engine.protocols import Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

# (scores [M, V], rows, addresses) -> one token per row, or UNUSABLE
Draw = Callable[[Tensor, Seq[int], Seq[Address]], list[int]]


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
        children = _children(forest)
        starts = forest.start.tolist()
        walks = [_Walk(start) for start in starts[:-1]]
        greedy = [b for b, seq in enumerate(seqs) if seq.params.greedy]
        sampled = [b for b, seq in enumerate(seqs) if not seq.params.greedy]
        # An argmax costs less than asking which rows need one: all rows at once, and one transfer.
        if greedy:
            rows = [i for b in greedy for i in range(starts[b], starts[b + 1])]
            best = dict(zip(rows, first_argmax(scores if len(rows) == len(scores) else scores[rows]), strict=True))
            for b in greedy:
                while walks[b].take(best[walks[b].row], children):
                    pass
        # Noise costs more than the rest of the verdict: only for rows that are reached, a level of all trees at a time.
        while sampled:
            addresses = [self._address(seqs[b], walks[b]) for b in sampled]
            tokens = self._draw(scores, [walks[b].row for b in sampled], addresses)
            sampled = [b for b, token in zip(sampled, tokens, strict=True) if walks[b].take(token, children)]
        return Verdict([walk.nodes for walk in walks], [walk.tokens for walk in walks])

    @staticmethod
    def _address(seq: Sequence, walk: _Walk) -> Address:
        return Address(seq.params.seed, seq.sample_index, seq.num_output + len(walk.nodes))


class _Walk:
    """One tree's way down: at the row `start + nodes[-1]`."""

    __slots__ = ("nodes", "row", "start", "tokens")

    def __init__(self, start: int) -> None:
        self.start = self.row = start
        self.nodes: list[int] = []
        self.tokens: list[int] = []

    def take(self, token: int, children: dict[tuple[int, int], int]) -> bool:
        """Emit the target's token at this row; True if a child carries it and the walk goes on."""
        if token == UNUSABLE:
            # Plain decoding would have emitted everything before this row: so does this.
            del self.nodes[-1:]
            return False
        self.tokens.append(token)
        child = children.get((self.row, token))
        if child is None:
            return False
        self.row = child
        self.nodes.append(child - self.start)
        return True


def _children(forest: DraftForest) -> dict[tuple[int, int], int]:
    """(row of a node, token) -> row of the first child that carries the token."""
    children: dict[tuple[int, int], int] = {}
    if not forest.num_drafts:
        return children
    starts = forest.start.tolist()
    tokens, parents = forest.token.tolist(), forest.parent.tolist()
    for b in range(forest.num_trees):
        for row in range(starts[b] + 1, starts[b + 1]):
            children.setdefault((starts[b] + parents[row], tokens[row]), row)
    return children
