"""How likely a draft node is to stand if its parent does: by drafter, depth and the drafter's own confidence, and by sequence.

Two layers. The table counts, over all sequences, how often nodes of a (drafter, depth, confidence bucket) stood; a cell with
few observations leans on its bucket at all depths, and that on the raw confidence (or, where the drafter has none, on a
constant). Beside it each sequence has, for each drafter, two offsets in the logarithm of the odds, one for first nodes and one
for those below: what the table says is its prior, and its own record moves it, the faster the less is known of it.
Both forget: cells halve when they are full, offsets fade in the time in which nothing was seen of them, so that what was once
bad is tried again.

What counts as an observation: the children of nodes that stood. A node below one that fell was never judged, and counting it
(or skipping a whole draft after its first rejection) would bias the rate of deep positions; of two drafters' children
the lesser is judged only where the better fell, which is what engine/fusion.py predicts.

Sources: core.md A.1 (per-request acceptance with a global prior), A.3 (conditional survival, calibrated), A.5; the offset is
an extended Kalman filter of a logistic model, as in Glicko (Glickman 1999).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.tree import DraftForest, Verdict

Double = NDArray[np.float64]
Int = NDArray[np.int64]

DEPTHS = (1, 2, 4, 8)  # last depth of each class; a further class holds what is deeper
EDGES = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.93, 0.97, 0.99]  # of confidence
UNSURE = len(EDGES) + 1  # the bucket of nodes without a confidence
FIRST_PRIOR, LATER_PRIOR = 0.6, 0.75  # of those, before anything was seen: rather too much, that they are shown and seen
CELL_WEIGHT, BUCKET_WEIGHT = 6.0, 12.0  # observations that the layer above is worth
FULL = 400.0  # observations after which a cell halves: its memory
LEANED = 8  # steps after which a cell that was not met itself follows its bucket
LOWEST, HIGHEST = 0.002, 0.995  # below 1, so that a child is never as likely as its parent
SPREAD = 2.0  # variance of the offsets among sequences
WANDER = 0.01  # variance that an offset gains with each observation: it never stops learning
LARGEST = 4.0  # offset
FADE = 0.01  # share of an unused offset that is lost with each step
BINS, BIN_MEMORY = 10, 0.998  # of the calibration error; what a bin keeps of itself with each node
FEW = 96  # nodes: up to here a loop is faster than arrays (8 nodes: 8 against 30 us; 256 nodes: 230 against 40 us)


@dataclass(slots=True)
class _Offset:
    """A sequence's own, in the logarithm of the odds."""

    last: int  # the step in which it was last moved; it fades from there
    value: float = 0.0
    precision: float = 1 / SPREAD

    def faded(self, step: int) -> float:
        return self.value * math.exp(FADE * (self.last - step))

    def move(self, step: int, surprise: float, information: float, count: float) -> None:
        """One filter step."""
        before = self.precision / (1 + WANDER * count * self.precision)
        precision = max(before, 1 / SPREAD) + information
        value = self.faded(step - 1) + surprise / precision
        self.precision, self.last = precision, step
        self.value = min(max(value, -LARGEST), LARGEST)


@dataclass(slots=True)
class _Move:
    """What one step tells an offset."""

    drafter: int
    own: _Offset
    faded: float
    surprise: float = 0.0
    information: float = 0.0
    count: int = 0


Own = tuple[_Offset, _Offset]  # of first nodes, of those below


class Survival:
    """Estimates for the nodes of a forest. Memory: 10 KB for each drafter, 0.3 KB for each sequence and drafter.

    Lists, as a step of few sequences touches a few numbers, each of which costs more in an array.
    """

    def __init__(self, drafters: Seq[str] = ()) -> None:
        self._index: dict[str, int] = {}
        self._own: dict[int, list[Own]] = {}  # by sequence, for each drafter
        self._step = 0
        self._cells: list[list[list[list[float]]]] = []  # [drafter][bucket][depth class]: nodes that stood, nodes judged
        self._sums: list[list[list[float]]] = []  # [drafter][bucket]: the same of all depths
        self._logit: list[list[list[float]]] = []  # [drafter][bucket][depth class]: of the rates that follow from them
        self._bins = [[0.0, 0.0, 0.0] for _ in range(BINS)]  # by predicted survival: weight, sum predicted, sum observed
        for name in drafters:
            self._of(name)

    @property
    def calibration_error(self) -> float:
        """Mean |predicted - observed| over bins of equal prediction, weighted by their recent nodes."""
        weight = sum(weight for weight, _, _ in self._bins)
        return sum(abs(predicted - observed) for _, predicted, observed in self._bins) / max(weight, 1.0)

    def estimate(self, drafter: str, seq_ids: Seq[int], forest: DraftForest) -> Double:
        """P(node stands | its parent stands) for each node of one drafter's forest; 1 for roots."""
        d = self._of(drafter)
        if forest.num_nodes > FEW:
            return self._estimate_many(d, seq_ids, forest)
        found: list[float] = []
        depths, starts = forest.depth.tolist(), forest.start.tolist()
        confidence, logits = _confidences(forest), self._logit[d]
        for seq_id, first, last in zip(seq_ids, starts, starts[1:], strict=False):
            found.append(1.0)
            if last > first + 1:
                offset, below = (own.faded(self._step) for own in self._of_sequence(seq_id)[d])
                for node in range(first + 1, last):
                    depth = depths[node]
                    logit = logits[_bucket(confidence[node])][_class(depth)]
                    found.append(_probability(logit + (below if depth > 1 else offset)))
        return np.array(found)

    def chain(self, drafter: str, seq_ids: Seq[int], length: int) -> Double:
        """P(at least i + 1 nodes of a chain stand) before anything is drafted: [B, length]."""
        d = self._of(drafter)
        hits, seen = np.array(self._cells[d]).sum(axis=0).T  # by depth class
        prior = np.where(np.arange(len(hits)) == 0, FIRST_PRIOR, LATER_PRIOR)
        rate = np.clip((hits + BUCKET_WEIGHT * prior) / (seen + BUCKET_WEIGHT), LOWEST, HIGHEST)
        logit = np.log(rate / (1 - rate))[[_class(depth) for depth in range(1, length + 1)]]
        offset = self._faded(d, seq_ids)[:, np.minimum(np.arange(length), 1)]
        estimate = 1.0 / (1.0 + np.exp(-logit - offset))
        return np.cumprod(np.clip(estimate, LOWEST, HIGHEST), axis=1)

    def learn(self, seq_ids: Seq[int], forest: DraftForest, verdict: Verdict, cut: bool = False) -> None:
        """What became of the nodes that the target judged. cut: the verdict is on a part of this forest (`hindsight`)."""
        self._step += 1
        if not forest.num_drafts:
            return
        confidence, depths = _confidences(forest), forest.depth.tolist()
        touched: dict[tuple[int, int, int], None] = {}  # (drafter, bucket, depth class)
        moves: dict[tuple[int, str, bool], _Move] = {}
        for seq_id, drafter, node, stood in self._judged(seq_ids, forest, verdict, cut):
            depth = depths[node]
            c, bucket = _class(depth), _bucket(confidence[node])
            move = moves.get((seq_id, drafter, depth > 1))
            if move is None:
                d = self._of(drafter)
                own = self._of_sequence(seq_id)[d][depth > 1]
                move = moves[seq_id, drafter, depth > 1] = _Move(d, own, own.faded(self._step))
            predicted = _probability(self._logit[move.drafter][bucket][c] + move.faded)
            self._count(move.drafter, bucket, c, predicted, stood)
            touched[move.drafter, bucket, c] = None
            move.surprise += stood - predicted
            move.information += predicted * (1 - predicted)
            move.count += 1
        for d, bucket, c in touched:
            self._refresh(d, bucket, c)
        if self._step % LEANED == 0:
            for d, bucket in {(d, bucket) for d, bucket, _ in touched}:
                self._refresh_all(d, bucket)
        for move in moves.values():
            move.own.move(self._step, move.surprise, move.information, move.count)

    def forget(self, seq_id: int) -> None:
        self._own.pop(seq_id, None)

    def _estimate_many(self, d: int, seq_ids: Seq[int], forest: DraftForest) -> Double:
        owner = np.repeat(np.arange(len(seq_ids)), np.diff(forest.start))
        classes = _CLASS[np.minimum(forest.depth, len(_CLASS) - 1)]
        logit = np.array(self._logit[d])[_buckets(forest.confidence, len(owner)), classes]
        logit += self._faded(d, seq_ids)[owner, (forest.depth > 1).astype(np.int64)]
        found = np.clip(1.0 / (1.0 + np.exp(-logit)), LOWEST, HIGHEST)
        found[forest.start[:-1]] = 1.0
        return found

    def _faded(self, d: int, seq_ids: Seq[int]) -> Double:
        """Offsets now: [B, 2]."""
        rows = [[own.faded(self._step) for own in self._of_sequence(seq_id)[d]] for seq_id in seq_ids]
        return np.array(rows).reshape(len(seq_ids), 2)

    def _judged(
        self, seq_ids: Seq[int], forest: DraftForest, verdict: Verdict, cut: bool
    ) -> Iterator[tuple[int, str, int, float]]:
        """(sequence, drafter, node, 1 or 0) for each node whose parent stood and that was really asked whether it stands."""
        parents, starts = forest.parent.tolist(), forest.start.tolist()
        names, estimate = forest.node_drafter, forest.estimate
        for b, seq_id in enumerate(seq_ids):
            first, last = starts[b], starts[b + 1]
            if last == first + 1 or not verdict.tokens[b]:
                continue
            path = hindsight(forest, b, verdict.tokens[b]) if cut else verdict.nodes[b]
            winner = dict(zip([0, *path], path, strict=False))  # a node that stood -> its child that did
            open_ = {0, *path[: len(verdict.tokens[b]) - 1]}  # behind the last token nothing is known
            for node in range(first + 1, last):
                if parents[node] not in open_:
                    continue
                name = forest.drafter[b] if names is None else names[node]
                best = winner.get(parents[node])
                stood = best == node - first
                if not stood and best is not None and names is not None and estimate is not None:
                    # The lesser child of another drafter: it is right or wrong only where the better one fell.
                    best += first
                    if names[best] != name and estimate[best] > estimate[node]:
                        continue
                yield seq_id, name, node, float(stood)

    def _count(self, d: int, bucket: int, c: int, predicted: float, stood: float) -> None:
        bin_ = self._bins[min(int(predicted * BINS), BINS - 1)]
        bin_[:] = BIN_MEMORY * bin_[0] + 1, BIN_MEMORY * bin_[1] + predicted, BIN_MEMORY * bin_[2] + stood
        cell, total = self._cells[d][bucket][c], self._sums[d][bucket]
        if cell[1] >= FULL:
            half = cell[0] / 2, cell[1] / 2
            cell[:] = half
            total[:] = total[0] - half[0], total[1] - half[1]
        cell[0] += stood
        cell[1] += 1
        total[0] += stood
        total[1] += 1

    def _refresh(self, d: int, bucket: int, c: int) -> None:
        """An entry of the table: a cell leans on its bucket, the bucket on what the drafter says."""
        hits, seen = self._cells[d][bucket][c]
        all_hits, all_seen = self._sums[d][bucket]
        self._logit[d][bucket][c] = _leaning(hits, seen, all_hits, all_seen, _PRIOR[c][bucket])

    def _refresh_all(self, d: int, bucket: int) -> None:
        for c in range(len(_PRIOR)):
            self._refresh(d, bucket, c)

    def _of_sequence(self, seq_id: int) -> list[Own]:
        """For each drafter; new ones start where the table is."""
        own = self._own.get(seq_id)
        if own is None:
            own = self._own[seq_id] = []
        while len(own) < len(self._index):
            own.append((_Offset(self._step), _Offset(self._step)))
        return own

    def _of(self, drafter: str) -> int:
        """The drafter's index; a new one gets a table of priors."""
        found = self._index.get(drafter)
        if found is None:
            found = self._index[drafter] = len(self._index)
            self._cells.append([[[0.0, 0.0] for _ in _PRIOR] for _ in range(UNSURE + 1)])
            self._sums.append([[0.0, 0.0] for _ in range(UNSURE + 1)])
            self._logit.append([[0.0] * len(_PRIOR) for _ in range(UNSURE + 1)])
            for bucket in range(UNSURE + 1):
                self._refresh_all(found, bucket)
        return found


def hindsight(forest: DraftForest, tree: int, committed: Seq[int]) -> list[int]:
    """The nodes of a tree that stood, or would have had they been shown: by the tokens that were committed.

    So what was drafted and not shown is judged as well. Judging only what was shown would make dropped nodes look bad for ever,
    and shown ones better than they are: it is the overrated that are shown. The last token may make a node stand that was
    dropped, so there may be as many as tokens.
    """
    part = forest.nodes(tree)
    tokens, parents = forest.token[part].tolist(), forest.parent[part].tolist()
    path: list[int] = []
    node = 0
    for token in committed:
        # The children of a node come behind it.
        node = next((i for i in range(node + 1, len(tokens)) if tokens[i] == token and parents[i] == node), 0)
        if not node:
            break
        path.append(node)
    return path


def path_survival(forest: DraftForest, estimate: Double) -> list[float]:
    """P(node stands): the product of the estimates along its path. [N], below its parent's wherever they are below 1."""
    if forest.num_nodes <= FEW:
        return _few_path_survival(forest, estimate)
    first = np.repeat(forest.start[:-1], np.diff(forest.start))
    jump = first + np.maximum(forest.parent, 0)  # a root is its own parent, and 1
    survival = estimate.copy()
    reach, depth = 1, int(forest.depth.max(initial=0))
    while reach < depth:  # doubling: after j rounds a node has the product over 2^j ancestors
        survival *= survival[jump]
        jump = jump[jump]
        reach *= 2
    return survival.tolist()


def _few_path_survival(forest: DraftForest, estimate: Double) -> list[float]:
    survival: list[float] = []
    first = 0
    for node, (parent, own) in enumerate(zip(forest.parent.tolist(), estimate.tolist(), strict=True)):
        if parent < 0:
            first = node
            survival.append(1.0)
        else:
            survival.append(survival[first + parent] * own)
    return survival


def _class(depth: int) -> int:
    return _CLASSES[depth] if depth < len(_CLASSES) else len(DEPTHS)


def _bucket(confidence: float) -> int:
    return UNSURE if confidence != confidence else bisect_left(EDGES, confidence)


def _buckets(confidence: NDArray[np.float32] | None, count: int) -> Int:
    if confidence is None:
        return np.full(count, UNSURE, dtype=np.int64)
    return np.where(np.isnan(confidence), UNSURE, np.searchsorted(EDGES, confidence))


def _confidences(forest: DraftForest) -> list[float]:
    return [math.nan] * forest.num_nodes if forest.confidence is None else forest.confidence.tolist()


def _probability(logit: float) -> float:
    return min(max(1.0 / (1.0 + math.exp(-logit)), LOWEST), HIGHEST)


def _leaning(hits: float, seen: float, all_hits: float, all_seen: float, prior: float) -> float:
    """The logarithm of the odds of a cell, which leans on its bucket, which leans on the prior."""
    bucket = (all_hits + BUCKET_WEIGHT * prior) / (all_seen + BUCKET_WEIGHT)
    rate = min(max((hits + CELL_WEIGHT * bucket) / (seen + CELL_WEIGHT), LOWEST), HIGHEST)
    return math.log(rate / (1 - rate))


def _priors() -> list[list[float]]:
    """[depth class][bucket]: the middle of the bucket, or what is expected of a node without a confidence."""
    bounds = [0.0, *EDGES, 1.0]
    middle = [(low + high) / 2 for low, high in pairwise(bounds)]
    return [[*middle, FIRST_PRIOR if c == 0 else LATER_PRIOR] for c in range(len(DEPTHS) + 1)]


_CLASSES = [bisect_left(DEPTHS, depth) for depth in range(DEPTHS[-1] + 2)]
_CLASS = np.array(_CLASSES)
_PRIOR = _priors()
