"""The match rule: at each node the target's own token is drawn; a child that carries it is descended to, else it is the bonus.

Greedy requests take the argmax of each row, others the row's Gumbel-max draw at the address of the output position. It never
looks at a draft's law, so it is exact for whatever the children are: the verifier `match` is this rule and nothing
else, and every other verifier uses it where a draft law plays no part (greedy requests, deterministic trees, bare roots).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

from torch import Tensor

from engine.gumbel_max import UNUSABLE, Address, first_argmax
from engine.sequence import Sequence
from engine.tree import DraftForest

# (scores [M, V], rows, addresses) -> one token per row, or UNUSABLE
Draw = Callable[[Tensor, Seq[int], Seq[Address]], list[int]]


class Walk:
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


def match_walks(forest: DraftForest, scores: Tensor, seqs: Seq[Sequence], trees: Iterable[int], draw: Draw) -> dict[int, Walk]:
    """The finished walk of each of these trees; scores [M, V] in node order."""
    children = _children(forest)
    starts = forest.start.tolist()
    walks = {b: Walk(starts[b]) for b in trees}
    greedy = [b for b in walks if seqs[b].params.greedy]
    sampled = [b for b in walks if not seqs[b].params.greedy]
    # An argmax costs less than asking which rows need one: all rows at once, and one transfer.
    if greedy:
        rows = [i for b in greedy for i in range(starts[b], starts[b + 1])]
        best = dict(zip(rows, first_argmax(scores if len(rows) == len(scores) else scores[rows]), strict=True))
        for b in greedy:
            while walks[b].take(best[walks[b].row], children):
                pass
    # Noise costs more than the rest of the verdict: only for rows that are reached, a level of all trees at a time.
    while sampled:
        addresses = [_address(seqs[b], walks[b]) for b in sampled]
        tokens = draw(scores, [walks[b].row for b in sampled], addresses)
        sampled = [b for b, token in zip(sampled, tokens, strict=True) if walks[b].take(token, children)]
    return walks


def _address(seq: Sequence, walk: Walk) -> Address:
    return Address(seq.params.seed, seq.sample_index, seq.num_output + len(walk.nodes))


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
