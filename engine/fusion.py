"""Trees of several drafters for one sequence, made one: their longest common prefixes are shared (a trie).

A node that several drafted is one node, under the name of whoever expects most of it. Where drafters disagree about what
comes next, the second opinion counts for as much as the first leaves: P(B stands) = P(A falls) P(B stands | A falls).
Source: the fusion of RASD (arXiv 2503.03434, ACL Findings 2025); what it prunes falls to the policy here.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from engine.tree import DraftForest

UNKNOWN = 0.5  # what is expected of a node when neither the drafter nor the policy says


@dataclass(slots=True)
class Tree:
    """One tree as lists, its root first. estimate: P(node stands | its parent stands); confidence: the drafter's own, or NaN."""

    token: list[int]
    parent: list[int]
    estimate: list[float]
    confidence: list[float]
    drafter: list[str]  # of each node
    law_row: list[int] | None = None  # where the children's draft law lies, for trees that were drawn from one

    @classmethod
    def of(cls, forest: DraftForest, index: int, name: str) -> Tree:
        part = forest.nodes(index)
        token = forest.token[part].tolist()
        confidence = [float("nan")] * len(token) if forest.confidence is None else forest.confidence[part].tolist()
        if forest.estimate is not None:
            estimate = forest.estimate[part].tolist()
        else:
            estimate = [UNKNOWN if c != c else c for c in confidence]
        return cls(token, forest.parent[part].tolist(), estimate, confidence, ["", *[name] * (len(token) - 1)])

    def gain(self) -> float:
        """Expected accepted nodes."""
        survival = self.survival()
        return sum(survival) - 1.0

    def survival(self) -> list[float]:
        """P(node stands); 1 for the root."""
        survival = [1.0]
        for parent, estimate in zip(self.parent[1:], self.estimate[1:], strict=True):
            survival.append(survival[parent] * estimate)
        return survival

    def main_drafter(self) -> str:
        """Whoever drafted most of it."""
        names = self.drafter[1:]
        return max(dict.fromkeys(names), key=names.count) if names else ""

    def cut(self, budget: int) -> Tree:
        """The `budget` nodes below the root that are likeliest to stand."""
        if len(self.token) - 1 <= budget:
            return self
        survival = self.survival()
        # Stable, so of equals the parent comes first and no node loses its own.
        kept = sorted(sorted(range(1, len(survival)), key=lambda node: -survival[node])[:budget])
        place = {0: 0} | {node: i for i, node in enumerate(kept, start=1)}
        kept = [0, *kept]
        return Tree(
            [self.token[i] for i in kept],
            [-1, *(place[self.parent[i]] for i in kept[1:])],
            [self.estimate[i] for i in kept],
            [self.confidence[i] for i in kept],
            [self.drafter[i] for i in kept],
        )


def fuse(trees: Seq[Tree]) -> Tree:
    """One trie of trees with the same root, the nodes of the first in their places."""
    first = trees[0]
    fused = Tree(first.token[:], first.parent[:], first.estimate[:], first.confidence[:], first.drafter[:])
    index = {key: node for node, key in reversed(list(enumerate(zip(first.parent, first.token, strict=True))))}
    contested: set[int] = set()
    for tree in trees[1:]:
        place = [0] * len(tree.token)
        for node in range(1, len(tree.token)):
            parent = place[tree.parent[node]]
            key = (parent, tree.token[node])
            found = index.get(key)
            if found is None:
                found = index[key] = len(fused.token)
                fused.token.append(tree.token[node])
                fused.parent.append(parent)
                fused.estimate.append(tree.estimate[node])
                fused.confidence.append(tree.confidence[node])
                fused.drafter.append(tree.drafter[node])
                contested.add(parent)
            elif tree.estimate[node] > fused.estimate[found]:
                fused.estimate[found], fused.confidence[found] = tree.estimate[node], tree.confidence[node]
                fused.drafter[found] = tree.drafter[node]
            place[node] = found
    _share(fused, contested)
    return fused


def _share(tree: Tree, contested: set[int]) -> None:
    """Where children of one node have different drafters: each gets its part of what the better ones leave."""
    children: dict[int, list[int]] = {parent: [] for parent in contested}
    for node in range(1, len(tree.token)):
        if tree.parent[node] in children:
            children[tree.parent[node]].append(node)
    for siblings in children.values():
        left: dict[str, float] = {}  # by drafter: what its own nodes have taken
        for node in sorted(siblings, key=lambda node: -tree.estimate[node]):
            name, estimate = tree.drafter[node], tree.estimate[node]
            others = sum(taken for other, taken in left.items() if other != name)
            tree.estimate[node] = estimate * max(1.0 - others, 0.0)
            left[name] = left.get(name, 0.0) + tree.estimate[node]


def forest_of(trees: Seq[Tree]) -> DraftForest:
    """The forest of one tree per sequence."""
    token: list[int] = []
    parent: list[int] = []
    depth: list[int] = []
    estimate: list[float] = []
    confidence: list[float] = []
    owners: list[str] = []
    law_row: list[int] = []
    start = [0]
    for tree in trees:
        depths = [0]
        for up in tree.parent[1:]:
            depths.append(depths[up] + 1)
        token += tree.token
        parent += tree.parent
        depth += depths
        estimate += tree.estimate
        confidence += tree.confidence
        owners += tree.drafter
        law_row += tree.law_row or [-1] * len(tree.token)
        start.append(len(token))
    return DraftForest(
        np.array(token, dtype=np.int32),
        np.array(parent, dtype=np.int32),
        np.array(depth, dtype=np.int32),
        np.array(start, dtype=np.int32),
        [tree.main_drafter() for tree in trees],
        confidence=np.array(confidence, dtype=np.float32),
        law_row=np.array(law_row, dtype=np.int32) if any(tree.law_row for tree in trees) else None,
        node_drafter=owners,
        estimate=np.array(estimate, dtype=np.float64),
    )
