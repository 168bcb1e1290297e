"""Draft trees grown best first: of all nodes in sight, the one most likely to stand is taken, and its children come into sight.

For conditional probabilities P(child stands | parent stands) this takes the `budget` nodes with the largest product along their
paths, which is the tree with the most expected tokens (Sequoia, arXiv 2402.12374, section 4.1; a heap instead of a table). It is
not a search with rollouts: the values are known as soon as a node is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from heapq import heappop, heappush
from typing import NamedTuple, TypeVar

import numpy as np

from engine.tree import DraftForest

S = TypeVar("S")
# state of a node -> (token, P(stands | parent stands), state) of its children, tokens distinct
Children = Callable[[S], Iterable[tuple[int, float, S]]]


class Branches(NamedTuple):
    """The nodes below one root, in topological order: parents[i] is 0 for a child of the root, else 1 + an index below i."""

    tokens: list[int]
    parents: list[int]
    confidence: list[float]


NO_BRANCHES = Branches([], [], [])


def grow(root: S, children: Children[S], budget: int, least: float = 0.0) -> Branches:
    """At most `budget` nodes, none whose path stands with a probability below `least`."""
    tokens: list[int] = []
    parents: list[int] = []
    confidence: list[float] = []
    heap: list[tuple[float, int, int, int, float, S]] = []
    parent, path, state, seen = 0, 1.0, root, 0
    while len(tokens) < budget:
        for token, p, below in children(state):
            if path * p >= least:
                seen += 1  # of equally likely ones, the first seen
                heappush(heap, (-path * p, seen, parent, token, p, below))
        if not heap:
            break
        negative, _, above, token, p, state = heappop(heap)
        tokens.append(token)
        parents.append(above)
        confidence.append(p)
        parent, path = len(tokens), -negative
    return Branches(tokens, parents, confidence)


def forest_of(roots: Seq[int], trees: Seq[Branches], drafter: str) -> DraftForest:
    """The forest of the trees below their roots, confidence included."""
    token: list[int] = []
    parent: list[int] = []
    depth: list[int] = []
    confidence: list[float] = []
    start = [0]
    for root, tree in zip(roots, trees, strict=True):
        token += [root, *tree.tokens]
        parent += [-1, *tree.parents]
        confidence += [1.0, *tree.confidence]
        levels = [0]
        for above in tree.parents:
            levels.append(levels[above] + 1)
        depth += levels
        start.append(len(token))
    names = [drafter if tree.tokens else "" for tree in trees]
    return DraftForest(
        np.array(token, dtype=np.int32),
        np.array(parent, dtype=np.int32),
        np.array(depth, dtype=np.int32),
        np.array(start, dtype=np.int32),
        names,
        np.array(confidence, dtype=np.float32),
    )
