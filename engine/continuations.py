"""Many continuations of one context -> the draft tree of their most frequent prefixes.

The trie is never built: only the prefixes that enter the tree are counted, the likeliest first, so that the cost follows the
size of the tree and the matches at its nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.tree import DraftForest

Ids = NDArray[np.int32]
Weights = NDArray[np.float32]

FEW = 48  # rows that are counted faster one by one than by numpy (measured: 48 rows take 6 us either way)


class Branches(NamedTuple):
    """A tree below a root, in topological order: node i hangs below parents[i], 0 being the root and i + 1 the name of node i.

    confidence[i]: estimated P(the target agrees with node i | it agrees with its parent).
    """

    tokens: list[int]
    parents: list[int]
    confidence: list[float]

    @classmethod
    def none(cls) -> Branches:
        return cls([], [], [])


def most_frequent(rows: Ids, budget: int, *, weights: Weights | None = None, doubt: float = 1.0, floor: float = 0.0) -> Branches:
    """The `budget` likeliest prefixes of `rows` [K, L], where -1 ends a row.

    A prefix with weight c below one with weight n stands with c / (n + doubt); none enters that stands, parents included, with
    less than `floor`. `weights` [K] counts rows more or less than once.
    """
    out = Branches.none()
    heap: list[tuple[float, int, int, float, int, int, NDArray[np.intp]]] = []
    order = 0
    node, depth, path = 0, 0, 1.0
    members = np.arange(len(rows))
    while len(out.tokens) < budget:
        if depth < rows.shape[1]:
            total = float(len(members) if weights is None else weights[members].sum()) + doubt
            for token, count in _count(rows[members, depth], members, weights, budget):
                share = count / total
                if path * share >= floor:
                    heappush(heap, (-path * share, order, token, share, depth, node, members))
                    order += 1
        if not heap:
            break
        negative, _, token, share, depth, node, members = heappop(heap)
        out.tokens.append(token)
        out.parents.append(node)
        out.confidence.append(share)
        members = members[rows[members, depth] == token]
        path, depth, node = -negative, depth + 1, len(out.tokens)
    return out


def _count(column: Ids, members: NDArray[np.intp], weights: Weights | None, most: int) -> list[tuple[int, float]]:
    """(token, weight) of the at most `most` heaviest tokens of a column."""
    if len(column) <= FEW:
        counts: dict[int, float] = {}
        each = [1.0] * len(column) if weights is None else weights[members].tolist()
        for token, weight in zip(column.tolist(), each, strict=True):
            if token >= 0 and weight > 0:
                counts[token] = counts.get(token, 0.0) + weight
        found = list(counts.items())
        if len(found) > most:
            found.sort(key=lambda item: -item[1])
        return found[:most]
    tokens, inverse = np.unique(column, return_inverse=True)
    sums = np.bincount(inverse, None if weights is None else weights[members], len(tokens))
    sums[tokens < 0] = 0
    best = np.argsort(-sums, kind="stable")[:most]
    return [(token, weight) for token, weight in zip(tokens[best].tolist(), sums[best].tolist(), strict=True) if weight > 0]


def forest(roots: Sequence[int], branches: Sequence[Branches], drafter: str) -> DraftForest:
    """One tree per root, its nodes below it, with their confidence."""
    trees = [([root, *found.tokens], [-1, *found.parents]) for root, found in zip(roots, branches, strict=True)]
    made = DraftForest.from_parents(trees, [drafter] * len(trees))
    made.confidence = np.array([c for found in branches for c in (1.0, *found.confidence)], dtype=np.float32)
    return made
