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
LOWEST, HIGHEST = 0.002, 0.995  # below 1, so that a child is never as likely as its parent
SPREAD = 2.0  # variance of the offsets among sequences
WANDER = 0.01  # variance that an offset gains with each observation: it never stops learning
LARGEST = 4.0  # offset
FADE = 0.01  # share of an unused offset that is lost with each step
LEAST_SEQUENCES = 64
BINS, BIN_MEMORY = 10, 0.998  # of the calibration error; what a bin keeps of itself with each node
FEW = 96  # nodes: up to here a loop is faster than arrays (8 nodes: 8 against 30 us; 256 nodes: 230 against 40 us)


class Survival:
    """Estimates for the nodes of a forest. Memory: 2 KB for each drafter, 48 bytes for each sequence and drafter."""

    def __init__(self, drafters: Seq[str] = ()) -> None:
        self._index: dict[str, int] = {}
        self._slots: dict[int, int] = {}
        self._free = list(range(LEAST_SEQUENCES))[::-1]
        self._step = 0
        self._cells: list[list[list[tuple[float, float]]]] = []  # [drafter][bucket][depth class]: nodes that stood, nodes judged
        self._logit = np.zeros((0, len(DEPTHS) + 1, UNSURE + 1))  # of the rates that follow from them
        self._offset = np.zeros((LEAST_SEQUENCES, 0, 2))
        self._precision = np.zeros((LEAST_SEQUENCES, 0, 2))
        self._last = np.zeros((LEAST_SEQUENCES, 0, 2))
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
        d, slots = self._of(drafter), self._rows(seq_ids)
        if forest.num_nodes > FEW:
            return self._estimate_many(d, np.array(slots), forest)
        found: list[float] = []
        depths = forest.depth.tolist()
        confidence = _confidences(forest)
        for slot, first, last in zip(slots, forest.start[:-1].tolist(), forest.start[1:].tolist(), strict=True):
            found.append(1.0)
            if last > first + 1:
                offsets = self._faded(slot, d, 0), self._faded(slot, d, 1)
                for node in range(first + 1, last):
                    depth = depths[node]
                    logit = self._logit[d, _class(depth), _bucket(confidence[node])] + offsets[depth > 1]
                    found.append(_probability(float(logit)))
        return np.array(found)

    def chain(self, drafter: str, seq_ids: Seq[int], length: int) -> Double:
        """P(at least i + 1 nodes of a chain stand) before anything is drafted: [B, length]."""
        d = self._of(drafter)
        hits, seen = np.array(self._cells[d]).sum(axis=0).T  # by depth class
        prior = np.where(np.arange(len(hits)) == 0, FIRST_PRIOR, LATER_PRIOR)
        rate = np.clip((hits + BUCKET_WEIGHT * prior) / (seen + BUCKET_WEIGHT), LOWEST, HIGHEST)
        logit = np.log(rate / (1 - rate))[[_class(depth) for depth in range(1, length + 1)]]
        offsets = np.array([[self._faded(slot, d, 0)] + [self._faded(slot, d, 1)] * (length - 1) for slot in self._rows(seq_ids)])
        estimate = 1.0 / (1.0 + np.exp(-logit - offsets.reshape(len(seq_ids), length)))
        return np.cumprod(np.clip(estimate, LOWEST, HIGHEST), axis=1)

    def learn(self, seq_ids: Seq[int], forest: DraftForest, verdict: Verdict) -> None:
        """What became of the nodes that the target judged."""
        self._step += 1
        if not forest.num_drafts:
            return
        confidence, depths = _confidences(forest), forest.depth.tolist()
        touched: set[tuple[int, int]] = set()
        moves: dict[tuple[int, int, int], list[float]] = {}  # (slot, drafter, later) -> surprise, information, observations
        for slot, drafter, node, stood in self._judged(seq_ids, forest, verdict):
            d, later = self._of(drafter), int(depths[node] > 1)
            cell = d, _class(depths[node]), _bucket(confidence[node])
            predicted = _probability(float(self._logit[cell]) + self._faded(slot, d, later))
            self._count(cell, predicted, stood)
            touched.add((d, cell[2]))
            move = moves.setdefault((slot, d, later), [0.0, 0.0, 0.0])
            move[0] += stood - predicted
            move[1] += predicted * (1 - predicted)
            move[2] += 1
        for d, bucket in touched:
            self._refresh(d, bucket)
        for place, (surprise, information, count) in moves.items():
            self._move(place, surprise, information, count)

    def forget(self, seq_id: int) -> None:
        slot = self._slots.pop(seq_id, None)
        if slot is not None:
            self._free.append(slot)

    def _estimate_many(self, d: int, slots: Int, forest: DraftForest) -> Double:
        owner = np.repeat(slots, np.diff(forest.start))
        later = (forest.depth > 1).astype(np.int64)
        idle = self._step - self._last[owner, d, later]
        classes = _CLASS[np.minimum(forest.depth, len(_CLASS) - 1)]
        logit = self._logit[d, classes, _buckets(forest.confidence, len(owner))]
        logit += self._offset[owner, d, later] * np.exp(-FADE * idle)
        found = np.clip(1.0 / (1.0 + np.exp(-logit)), LOWEST, HIGHEST)
        found[forest.start[:-1]] = 1.0
        return found

    def _faded(self, slot: int, d: int, later: int) -> float:
        """A sequence's offset, faded by the steps since it was last moved."""
        return float(self._offset[slot, d, later]) * math.exp(-FADE * (self._step - self._last[slot, d, later]))

    def _judged(self, seq_ids: Seq[int], forest: DraftForest, verdict: Verdict) -> Iterator[tuple[int, str, int, float]]:
        """(slot, drafter, node, 1 or 0) for each node whose parent stood and that was really asked whether it stands."""
        parents, starts = forest.parent.tolist(), forest.start.tolist()
        names, estimate = forest.node_drafter, forest.estimate
        for b, slot in enumerate(self._rows(seq_ids)):
            first, last = starts[b], starts[b + 1]
            if last == first + 1 or not verdict.tokens[b]:
                continue
            path = verdict.nodes[b]
            winner = dict(zip([0, *path], path, strict=False))  # a node that stood -> its child that did
            open_ = {0, *path}
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
                yield slot, name, node, float(stood)

    def _count(self, cell: tuple[int, int, int], predicted: float, stood: float) -> None:
        d, c, bucket = cell
        bin_ = self._bins[min(int(predicted * BINS), BINS - 1)]
        bin_[:] = BIN_MEMORY * bin_[0] + 1, BIN_MEMORY * bin_[1] + predicted, BIN_MEMORY * bin_[2] + stood
        column = self._cells[d][bucket]
        hits, seen = column[c]
        if seen >= FULL:
            hits, seen = hits / 2, seen / 2
        column[c] = hits + stood, seen + 1

    def _refresh(self, d: int, bucket: int) -> None:
        """The table's entries of one bucket: each cell leans on the bucket, the bucket on what the drafter says."""
        column = self._cells[d][bucket]
        all_hits, all_seen = sum([hits for hits, _ in column]), sum([seen for _, seen in column])
        for c, (hits, seen) in enumerate(column):
            self._logit[d, c, bucket] = _leaning(hits, seen, all_hits, all_seen, _PRIOR[c][bucket])

    def _move(self, place: tuple[int, int, int], surprise: float, information: float, count: float) -> None:
        """One filter step of a sequence's offset."""
        idle = self._step - 1 - self._last[place]
        before = self._precision[place] / (1 + WANDER * count * self._precision[place])
        precision = max(before, 1 / SPREAD) + information
        offset = self._offset[place] * math.exp(-FADE * idle) + surprise / precision
        self._precision[place], self._last[place] = precision, self._step
        self._offset[place] = min(max(offset, -LARGEST), LARGEST)

    def _rows(self, seq_ids: Seq[int]) -> list[int]:
        """The slot of each sequence; new ones start where the table is."""
        for seq_id in seq_ids:
            if seq_id not in self._slots:
                self._slots[seq_id] = self._slot()
        return [self._slots[seq_id] for seq_id in seq_ids]

    def _slot(self) -> int:
        if not self._free:
            size = len(self._offset)
            self._offset, self._precision, self._last = (
                np.concatenate([array, np.zeros_like(array)]) for array in (self._offset, self._precision, self._last)
            )
            self._free = list(range(size, 2 * size))[::-1]
        slot = self._free.pop()
        self._offset[slot] = 0.0
        self._precision[slot] = 1 / SPREAD
        self._last[slot] = self._step
        return slot

    def _of(self, drafter: str) -> int:
        """The drafter's index; a new one gets a table of priors."""
        found = self._index.get(drafter)
        if found is None:
            found = self._index[drafter] = len(self._index)
            self._cells.append([[(0.0, 0.0)] * len(_PRIOR) for _ in range(UNSURE + 1)])
            self._logit = np.concatenate([self._logit, np.zeros((1, *self._logit.shape[1:]))])
            count = len(self._offset)
            self._offset, self._last = (
                np.concatenate([array, np.zeros((count, 1, 2))], axis=1) for array in (self._offset, self._last)
            )
            self._precision = np.concatenate([self._precision, np.full((count, 1, 2), 1 / SPREAD)], axis=1)
            for bucket in range(UNSURE + 1):
                self._refresh(found, bucket)
        return found


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
