"""What verifiers that judge tokens by their draft law have in common: a tree with its laws, coins, and the last draw.

A rule sees one tree at a time and answers with a `Ruling`: which nodes stand and from what law the token behind them is
drawn. `verdict` does the rest: greedy requests and deterministic trees go by the match rule (engine/walk.py), which accepts
as often there as any exact rule; the last tokens of all trees are drawn together.

Coins and draws are pure functions of (seed, sample, position, node), so that a step may be repeated; but which token a
position gets depends on the drafts it was shown. The same seed gives the same tokens for the same schedule of drafts; only
`match` promises the tokens of plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.child_law import ChildLaw, SiblingLaws
from engine.gumbel_max import UNUSABLE, Address
from engine.noise import TARGET, coin
from engine.protocols import Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.walk import Draw, match_walks

# (sequence, node) -> a number in [0, 1) that nothing else depends on
Coin = Callable[[Sequence, int], float]
Kinds = Mapping[str, Siblings]  # drafter -> how it chooses siblings


def addressed_coin(seq: Sequence, node: int) -> float:
    """The coin of one node of the draft tree rooted at the end of seq."""
    return coin(seq.params.seed, seq.sample_index, seq.num_output, node)


@dataclass(slots=True)
class Ruling:
    """node: the deepest node that stands, with its ancestors (0: the root alone).

    The token behind it is `token`, or else drawn from `law` [V] (probabilities, any sum), or else from the node's own row.
    """

    node: int
    law: Tensor | None = None
    token: int | None = None


class RuledTree:
    """One tree of a forest as a rule reads it: local node indices, target laws and draft laws.

    Laws are float32, or float64 where the scores are: the exact-law tests are.
    """

    def __init__(self, forest: DraftForest, scores: Tensor, seqs: Seq[Sequence], tree: int, kinds: Kinds) -> None:
        part = forest.nodes(tree)
        self.seq = seqs[tree]
        self.token: list[int] = forest.token[part].tolist()
        self.parent: list[int] = forest.parent[part].tolist()
        self.children: list[list[int]] = [[] for _ in self.token]  # in draw order
        for node, parent in enumerate(self.parent[1:], start=1):
            self.children[parent].append(node)
        self._scores = scores[part]
        self._law = forest.law
        self._law_row = [-1] * len(self.token) if forest.law_row is None else forest.law_row[part].tolist()
        names = forest.node_drafter[part] if forest.node_drafter is not None else None
        self._names = names or [forest.drafter[tree] if forest.drafter else ""] * len(self.token)
        self._kinds = kinds
        self._known: dict[int, Tensor | None] = {}

    def p(self, node: int) -> Tensor | None:
        """The target law [V] behind a node; None where its row is unusable (NaN, infinity, or nothing allowed)."""
        if node not in self._known:
            row = self._scores[node]
            law = torch.softmax(row if row.dtype == torch.float64 else row.float(), -1)
            self._known[node] = None if bool(torch.isnan(law[0])) else law
        return self._known[node]

    def q(self, node: int) -> Tensor | None:
        """The law [V] that the sampled children of a node were drawn from; None where there is none."""
        row = self._law_row[node]
        if row < 0 or self._law is None:
            return None
        law = self._law[row]
        return law.to(torch.float64 if self._scores.dtype == torch.float64 else torch.float32)

    def laws(self, node: int) -> Iterator[tuple[int, ChildLaw]]:
        """The children of a node in draw order, each with its law given those before it."""
        laws = SiblingLaws(self.q(node))
        for child in self.children[node]:
            yield child, laws.next(self.token[child], self.kind(child))

    def kind(self, node: int) -> Siblings:
        """How a node was chosen. Raises KeyError for a sampled node of a drafter that nobody has heard of."""
        return self._kinds[self._names[node]] if self._law_row[self.parent[node]] >= 0 else Siblings.POINT

    def path(self, node: int) -> list[int]:
        """The nodes from the root's child down to `node`; empty for the root."""
        nodes: list[int] = []
        while node > 0:
            nodes.append(node)
            node = self.parent[node]
        return nodes[::-1]

    def address(self, depth: int, stream: int = TARGET) -> Address:
        """Where the noise lies that draws the token behind a node of this depth."""
        return Address(self.seq.params.seed, self.seq.sample_index, self.seq.num_output + depth, stream)


Judge = Callable[[RuledTree], Ruling]


def verdict(
    forest: DraftForest,
    scores: Tensor,
    seqs: Seq[Sequence],
    kinds: Kinds,
    judge: Judge,
    draw: Draw,
    *,
    every_tree: bool = False,
    stream: int = TARGET,
) -> Verdict:
    """The verdict on every tree; scores [M, V] in node order.

    `judge` rules over the trees with sampled nodes of requests that are not greedy (`every_tree`: over all of those
    requests'), and its last draws take their noise from `stream`.
    """
    ruled = [b for b, seq in enumerate(seqs) if not seq.params.greedy and (every_tree or forest.is_sampled(b))]
    matched = sorted(set(range(forest.num_trees)) - set(ruled))
    nodes: dict[int, list[int]] = {}
    tokens: dict[int, list[int]] = {}
    for b, walk in match_walks(forest, scores, seqs, matched, draw).items():
        nodes[b], tokens[b] = walk.nodes, walk.tokens
    trees = {b: RuledTree(forest, scores, seqs, b, kinds) for b in ruled}
    rulings = {b: judge(tree) for b, tree in trees.items()}
    last = _last_tokens(forest, scores, trees, rulings, draw, stream)
    for b, ruling in rulings.items():
        path = trees[b].path(ruling.node)
        tokens[b] = [trees[b].token[node] for node in path]
        if last[b] == UNUSABLE:
            nodes[b] = path[:-1]  # plain decoding would have emitted everything before this row
        else:
            nodes[b] = path
            tokens[b].append(last[b])
    return Verdict([nodes[b] for b in range(forest.num_trees)], [tokens[b] for b in range(forest.num_trees)])


def _last_tokens(
    forest: DraftForest, scores: Tensor, trees: dict[int, RuledTree], rulings: dict[int, Ruling], draw: Draw, stream: int
) -> dict[int, int]:
    """The token behind the accepted path of each ruled tree."""
    last = {b: ruling.token for b, ruling in rulings.items() if ruling.token is not None}
    rows = [b for b, ruling in rulings.items() if ruling.token is None and ruling.law is None]
    laws = [b for b, ruling in rulings.items() if ruling.token is None and ruling.law is not None]

    def addresses(which: list[int]) -> list[Address]:
        return [trees[b].address(len(trees[b].path(rulings[b].node)), stream) for b in which]

    if rows:
        found = draw(scores, [int(forest.start[b]) + rulings[b].node for b in rows], addresses(rows))
        last.update(zip(rows, found, strict=True))
    if laws:
        stacked = torch.stack([law.log() for b in laws if (law := rulings[b].law) is not None])
        last.update(zip(laws, draw(stacked, range(len(laws)), addresses(laws)), strict=True))
    return last
