"""Draft trees of a batch, flattened, and the verdict on them.

Node 0 of every tree is its root: the last committed token. Row i of the model's output is "what comes after node i", so
plain decoding is a forest of roots. Nodes are in topological order: a parent comes before its children.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Int = NDArray[np.int32]
Float = NDArray[np.float32]
Double = NDArray[np.float64]

FEW = 96  # nodes
CUT_ABOVE = "a forest is cut below a node, never above one that stays"


@dataclass(slots=True)
class DraftForest:
    """B trees with N nodes in all, roots included.

    token [N], parent [N] (index inside the own tree, -1 for the root), depth [N] (root 0), start [B+1] (tree b owns nodes
    start[b]:start[b+1]); drafter [B] names who drafted the tree ("" for a bare root).

    confidence [N], where the drafter has one: its own estimate of P(node stands | its parent stands), 1 for a root; raw,
    the policy calibrates it, into `estimate` [N]; NaN in trees of a drafter that has none, where others have. law [K, V] and
    law_row [N], only for children drawn from a draft law (Siblings IID, DISTINCT and GREEDY): the children of node i were
    drawn, in node order, from softmax-normalised law[law_row[i]] (float32 probabilities, exactly the law of the draw); -1 where
    they were chosen deterministically. node_drafter [N] names who drafted each node where trees of several drafters were
    fused into one.
    """

    token: Int
    parent: Int
    depth: Int
    start: Int
    drafter: list[str] = field(default_factory=list)
    confidence: Float | None = None
    law: torch.Tensor | None = None
    law_row: Int | None = None
    node_drafter: list[str] | None = None
    estimate: Double | None = None

    @property
    def num_trees(self) -> int:
        return len(self.start) - 1

    @property
    def num_nodes(self) -> int:
        return int(self.start[-1])

    @property
    def num_drafts(self) -> int:
        return self.num_nodes - self.num_trees

    def size(self, tree: int) -> int:
        """Nodes of one tree, the root included."""
        return int(self.start[tree + 1] - self.start[tree])

    def nodes(self, tree: int) -> slice:
        return slice(int(self.start[tree]), int(self.start[tree + 1]))

    @property
    def is_chains(self) -> bool:
        """True when no tree branches: every node lies one below the node before it."""
        first = np.repeat(self.start[:-1], np.diff(self.start))
        return bool((self.depth == np.arange(self.num_nodes) - first).all())

    def is_sampled(self, tree: int) -> bool:
        """True when some children of the tree were drawn from a draft law."""
        return self.law_row is not None and bool((self.law_row[self.nodes(tree)] >= 0).any())

    def ancestors(self, tree: int) -> NDArray[np.bool_]:
        """anc[i, j]: node j is i or an ancestor of i. Shape [n, n], lower triangular."""
        parent = self.parent[self.nodes(tree)]
        anc = np.eye(len(parent), dtype=bool)
        for i in range(1, len(parent)):
            anc[i] |= anc[parent[i]]
        return anc

    def path(self, tree: int, node: int) -> list[int]:
        """Token ids from the root's child down to `node` (local index); empty for the root."""
        first = int(self.start[tree])
        tokens: list[int] = []
        while node > 0:
            tokens.append(int(self.token[first + node]))
            node = int(self.parent[first + node])
        return tokens[::-1]

    def keep(self, kept: NDArray[np.bool_]) -> DraftForest:
        """The forest of the nodes with kept [N] true. ValueError when a root, or the parent of a kept node, is not."""
        start, parent = self._kept_shape(kept) if len(kept) > FEW else self._few_kept_shape(kept.tolist())
        names = [name if size > 1 else "" for name, size in zip(self.drafter, np.diff(start).tolist(), strict=False)]
        return DraftForest(
            self.token[kept],
            parent,
            self.depth[kept],
            start,
            names,
            None if self.confidence is None else self.confidence[kept],
            self.law,
            None if self.law_row is None else self.law_row[kept],
            None if self.node_drafter is None else [n for n, k in zip(self.node_drafter, kept.tolist(), strict=True) if k],
            None if self.estimate is None else self.estimate[kept],
        )

    def _few_kept_shape(self, kept: list[bool]) -> tuple[Int, Int]:
        """start and parent of what stays: for few nodes a loop is faster than a dozen array operations."""
        parents, starts = self.parent.tolist(), self.start.tolist()
        start, parent = [0], []
        for first, last in pairwise(starts):
            place: dict[int, int] = {-1: -1}
            if not kept[first]:
                raise ValueError(CUT_ABOVE)
            for node in range(first, last):
                if kept[node]:
                    if parents[node] not in place:
                        raise ValueError(CUT_ABOVE)
                    parent.append(place[parents[node]])
                    place[node - first] = len(place) - 1
            start.append(len(parent))
        return np.array(start, dtype=np.int32), np.array(parent, dtype=np.int32)

    def _kept_shape(self, kept: NDArray[np.bool_]) -> tuple[Int, Int]:
        sizes = np.diff(self.start)
        first = np.repeat(self.start[:-1], sizes)
        up = first + np.maximum(self.parent, 0)
        if not kept[self.start[:-1]].all() or not kept[up[kept]].all():
            raise ValueError(CUT_ABOVE)
        rank = np.cumsum(kept, dtype=np.int32) - 1  # global index after the cut
        start = np.concatenate(([0], np.cumsum(kept, dtype=np.int32)[self.start[1:] - 1])).astype(np.int32)
        owner = np.repeat(np.arange(self.num_trees), sizes)
        parent = np.where(self.parent < 0, -1, rank[up] - start[owner]).astype(np.int32)
        return start, parent[kept]

    def without_drafts(self, trees: Sequence[int]) -> DraftForest:
        """The forest with these trees cut down to their roots."""
        kept = np.ones(self.num_nodes, dtype=bool)
        for b in trees:
            kept[self.start[b] + 1 : self.start[b + 1]] = False
        return self.keep(kept)

    def select(self, trees: Sequence[int]) -> DraftForest:
        """The forest of these trees, in this order, over the same laws."""
        nodes = np.concatenate([np.arange(self.start[b], self.start[b + 1]) for b in trees])
        start = np.cumsum([0] + [self.size(b) for b in trees], dtype=np.int32)
        return DraftForest(
            self.token[nodes],
            self.parent[nodes],
            self.depth[nodes],
            start,
            [self.drafter[b] for b in trees] if self.drafter else [],
            None if self.confidence is None else self.confidence[nodes],
            self.law,
            None if self.law_row is None else self.law_row[nodes],
            None if self.node_drafter is None else [self.node_drafter[i] for i in nodes],
            None if self.estimate is None else self.estimate[nodes],
        )

    @classmethod
    def from_chains(
        cls, roots: Sequence[int], chains: Iterable[Sequence[int]], drafter: Sequence[str] | None = None
    ) -> DraftForest:
        """A forest of chains: tree b is roots[b] followed by chains[b]."""
        token: list[int] = []
        depth: list[int] = []
        start = [0]
        names: list[str] = []
        for b, (root, chain) in enumerate(zip(roots, chains, strict=True)):
            token.append(root)
            token.extend(chain)
            depth.extend(range(len(chain) + 1))
            start.append(len(token))
            names.append(drafter[b] if drafter is not None and chain else "")
        depth_array = np.array(depth, dtype=np.int32)
        return cls(np.array(token, dtype=np.int32), depth_array - 1, depth_array, np.array(start, dtype=np.int32), names)

    @classmethod
    def roots(cls, tokens: Sequence[int]) -> DraftForest:
        return cls.from_chains(tokens, [()] * len(tokens))

    @classmethod
    def from_parents(
        cls, trees: Sequence[tuple[Sequence[int], Sequence[int]]], drafter: Sequence[str] | None = None
    ) -> DraftForest:
        """General trees as (tokens, parents) per tree, node 0 the root with parent -1.

        Raises ValueError when a parent does not come before its child.
        """
        token = np.array([t for tokens, _ in trees for t in tokens], dtype=np.int32)
        parent = np.array([p for _, parents in trees for p in parents], dtype=np.int32)
        start = np.cumsum([0] + [len(tokens) for tokens, _ in trees], dtype=np.int32)
        depth = np.zeros(len(token), dtype=np.int32)
        for first, last in pairwise(start.tolist()):
            if parent[first] != -1:
                raise ValueError("node 0 of a draft tree is its root and has parent -1")
            for i in range(first + 1, last):
                if not 0 <= parent[i] < i - first:
                    raise ValueError("a draft node's parent must come before it")
                depth[i] = depth[first + parent[i]] + 1
        names = [d if len(t[0]) > 1 else "" for d, t in zip(drafter or [""] * len(trees), trees, strict=True)]
        return cls(token, parent, depth, start, names)


@dataclass(slots=True)
class Verdict:
    """The accepted path of each tree and the bonus token.

    nodes[b]: local indices of the accepted nodes, root excluded, ascending; tokens[b]: their tokens and then the bonus,
    so len(tokens[b]) == len(nodes[b]) + 1. Where the root's own row is unusable (NaN, or nothing allowed) both are empty and
    the sequence cannot go on; where a later row of the path is, the path stops before it.
    """

    nodes: list[list[int]]
    tokens: list[list[int]]

    def void(self, tree: int) -> None:
        """As if the root's own row were unusable."""
        self.nodes[tree], self.tokens[tree] = [], []
