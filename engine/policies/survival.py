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

from collections.abc import Sequence as Seq

import numpy as np
from numpy.typing import NDArray

from engine.tree import DraftForest, Verdict

Double = NDArray[np.float64]
Int = NDArray[np.int64]

DEPTHS = (1, 2, 4, 8)  # last depth of each class; a further class holds what is deeper
EDGES = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.88, 0.93, 0.97, 0.99])  # of confidence
UNSURE = len(EDGES) + 1  # the bucket of nodes without a confidence
FIRST_PRIOR, LATER_PRIOR = 0.4, 0.7  # of those, before anything was seen
CELL_WEIGHT, BUCKET_WEIGHT = 6.0, 12.0  # observations that the layer above is worth
FULL = 2000.0  # observations after which a cell halves: its memory
LOWEST, HIGHEST = 0.002, 0.995  # below 1, so that a child is never as likely as its parent
SPREAD = 1.0  # variance of the offsets among sequences
WANDER = 0.03  # variance that an offset gains with each observation: it never stops learning
FADE = 0.02  # share of an unused offset that is lost with each step
LEAST_SEQUENCES = 64
BINS = 10


class Survival:
    """Estimates for the nodes of a forest. Memory: 2 KB for each drafter, 48 bytes for each sequence and drafter."""

    def __init__(self, drafters: Seq[str] = ()) -> None:
        self._index: dict[str, int] = {}
        self._slots: dict[int, int] = {}
        self._free = list(range(LEAST_SEQUENCES))[::-1]
        self._step = 0
        shape = (0, len(DEPTHS) + 1, UNSURE + 1)
        self._hits, self._seen = np.zeros(shape), np.zeros(shape)
        self._logit = np.zeros(shape)
        self._offset = np.zeros((LEAST_SEQUENCES, 0, 2))
        self._precision = np.zeros((LEAST_SEQUENCES, 0, 2))
        self._last = np.zeros((LEAST_SEQUENCES, 0, 2))
        self._bins = np.zeros((3, BINS))  # by predicted survival: weight, sum predicted, sum observed
        for name in drafters:
            self._of(name)

    @property
    def calibration_error(self) -> float:
        """Mean |predicted - observed| over bins of equal prediction, weighted by their recent nodes."""
        weight, predicted, observed = self._bins
        return float(np.abs(predicted - observed).sum() / max(weight.sum(), 1.0))

    def estimate(self, drafter: str, seq_ids: Seq[int], forest: DraftForest) -> Double:
        """P(node stands | its parent stands) for each node of one drafter's forest; 1 for roots."""
        slots = np.repeat(self._rows(seq_ids), np.diff(forest.start))
        found = self._estimate(np.int64(self._of(drafter)), slots, forest.depth, forest.confidence)
        found[forest.start[:-1]] = 1.0
        return found

    def chain(self, drafter: str, seq_ids: Seq[int], length: int) -> Double:
        """P(at least i + 1 nodes of a chain stand) before anything is drafted: [B, length]."""
        d = self._of(drafter)
        hits, seen = self._hits[d].sum(axis=1), self._seen[d].sum(axis=1)
        depths = np.arange(1, length + 1)
        classes = np.searchsorted(DEPTHS, depths)
        prior = np.where(depths == 1, FIRST_PRIOR, LATER_PRIOR)
        rate = np.clip((hits[classes] + BUCKET_WEIGHT * prior) / (seen[classes] + BUCKET_WEIGHT), LOWEST, HIGHEST)
        later = (depths > 1).astype(np.int64)
        rows = self._rows(seq_ids)[:, None]
        estimate = _sigmoid(np.log(rate / (1 - rate)) + self._faded(rows, np.int64(d), later))
        return np.cumprod(np.clip(estimate, LOWEST, HIGHEST), axis=1, dtype=np.float64)

    def learn(self, seq_ids: Seq[int], forest: DraftForest, verdict: Verdict) -> None:
        """What became of the nodes that the target judged."""
        self._step += 1
        if not forest.num_drafts:
            return
        node, stood, first = _judged(forest, verdict)
        if not len(node):
            return
        drafters = self._drafters(forest)
        if forest.estimate is not None and forest.node_drafter is not None:
            fair = _uncontested(forest, node, stood, first, drafters)
            node, stood = node[fair], stood[fair]
        owner = np.searchsorted(forest.start, node, side="right") - 1
        d, slots, depth = drafters[node], self._rows(seq_ids)[owner], forest.depth[node]
        confidence = None if forest.confidence is None else forest.confidence[node]
        predicted = self._estimate(d, slots, depth, confidence)
        self._judge(predicted, stood)
        self._count(d, depth, _buckets(confidence, len(node)), stood)
        self._move(slots, d, (depth > 1).astype(np.int64), stood - predicted, predicted * (1 - predicted))

    def forget(self, seq_id: int) -> None:
        slot = self._slots.pop(seq_id, None)
        if slot is not None:
            self._free.append(slot)

    def _estimate(
        self, d: Int | np.int64, slots: Int, depth: NDArray[np.int32], confidence: NDArray[np.float32] | None
    ) -> Double:
        classes = _CLASS[np.minimum(depth, len(_CLASS) - 1)]
        logit = self._logit[d, classes, _buckets(confidence, len(depth))]
        logit += self._faded(slots, d, (depth > 1).astype(np.int64))
        return np.clip(_sigmoid(logit), LOWEST, HIGHEST)

    def _faded(self, slots: Int, d: Int | np.int64, later: Int) -> Double:
        """Each sequence's offset, faded by the steps since it was last moved."""
        idle = self._step - self._last[slots, d, later]
        return self._offset[slots, d, later] * np.exp(-FADE * idle)

    def _judge(self, predicted: Double, stood: Double) -> None:
        bins = np.minimum((predicted * BINS).astype(np.int64), BINS - 1)
        self._bins *= 0.99
        for row, values in zip(self._bins, (np.ones(len(bins)), predicted, stood), strict=True):
            row += np.bincount(bins, values, minlength=BINS)

    def _count(self, d: Int, depth: NDArray[np.int32], bucket: Int, stood: Double) -> None:
        cell = (d, _CLASS[np.minimum(depth, len(_CLASS) - 1)], bucket)
        np.add.at(self._seen, cell, 1.0)
        np.add.at(self._hits, cell, stood)
        full = self._seen > FULL
        self._seen[full] /= 2
        self._hits[full] /= 2
        for drafter in np.unique(d):
            self._refresh(int(drafter))

    def _refresh(self, d: int) -> None:
        """The table of one drafter: each cell leans on its bucket, each bucket on what the drafter says."""
        bucket = (self._hits[d].sum(axis=0) + BUCKET_WEIGHT * _PRIOR) / (self._seen[d].sum(axis=0) + BUCKET_WEIGHT)
        rate = np.clip((self._hits[d] + CELL_WEIGHT * bucket) / (self._seen[d] + CELL_WEIGHT), LOWEST, HIGHEST)
        self._logit[d] = np.log(rate / (1 - rate))

    def _move(self, slots: Int, d: Int, later: Int, surprise: Double, information: Double) -> None:
        """One filter step for each (sequence, drafter, first or later) that was observed."""
        width = self._offset.shape[1] * 2
        cell, inverse = np.unique(slots * width + d * 2 + later, return_inverse=True)
        error, gained = np.bincount(inverse, surprise), np.bincount(inverse, information)
        offset, precision, last = self._offset.reshape(-1), self._precision.reshape(-1), self._last.reshape(-1)
        before = precision[cell] / (1 + WANDER * precision[cell] * np.bincount(inverse))
        precision[cell] = np.maximum(before, 1 / SPREAD) + gained
        faded = offset[cell] * np.exp(-FADE * (self._step - 1 - last[cell]))
        offset[cell] = np.clip(faded + error / precision[cell], -4.0, 4.0)
        last[cell] = self._step

    def _drafters(self, forest: DraftForest) -> Int:
        """The drafter of each node, as an index."""
        if forest.node_drafter is not None:
            return np.array([self._of(name) if name else 0 for name in forest.node_drafter], dtype=np.int64)
        trees = np.array([self._of(name) if name else 0 for name in forest.drafter], dtype=np.int64)
        return np.repeat(trees, np.diff(forest.start))

    def _rows(self, seq_ids: Seq[int]) -> Int:
        """The slot of each sequence; new ones start where the table is."""
        for seq_id in seq_ids:
            if seq_id not in self._slots:
                self._slots[seq_id] = self._slot()
        return np.array([self._slots[seq_id] for seq_id in seq_ids], dtype=np.int64)

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
            self._hits, self._seen, self._logit = (
                np.concatenate([array, np.zeros((1, *array.shape[1:]))]) for array in (self._hits, self._seen, self._logit)
            )
            count = len(self._offset)
            self._offset, self._last = (
                np.concatenate([array, np.zeros((count, 1, 2))], axis=1) for array in (self._offset, self._last)
            )
            self._precision = np.concatenate([self._precision, np.full((count, 1, 2), 1 / SPREAD)], axis=1)
            self._refresh(found)
        return found


def path_survival(forest: DraftForest, estimate: Double) -> Double:
    """P(node stands): the product of the estimates along its path. [N], below its parent's wherever they are below 1."""
    jump = _up(forest)
    survival = estimate.copy()
    survival[forest.start[:-1]] = 1.0
    reach, depth = 1, int(forest.depth.max(initial=0))
    while reach < depth:  # doubling: after j rounds a node has the product over 2^j ancestors
        survival *= survival[jump]
        jump = jump[jump]
        reach *= 2
    return survival


def _up(forest: DraftForest) -> Int:
    """Each node's parent as a global index; a root is its own."""
    first = np.repeat(forest.start[:-1], np.diff(forest.start)).astype(np.int64)
    return first + np.maximum(forest.parent, 0)


def _judged(forest: DraftForest, verdict: Verdict) -> tuple[Int, Double, Int]:
    """Nodes whose parent stood, whether they stood (0 or 1), and for every node of the forest its child that stood, or -1."""
    stood = np.zeros(forest.num_nodes, dtype=bool)
    starts = forest.start.tolist()
    usable = [bool(tokens) for tokens in verdict.tokens]
    stood[[start for start, ok in zip(starts[:-1], usable, strict=True) if ok]] = True
    path = [start + node for start, nodes in zip(starts[:-1], verdict.nodes, strict=True) for node in nodes]
    stood[path] = True
    up = _up(forest)
    child = np.full(forest.num_nodes, -1, dtype=np.int64)
    child[up[path]] = path
    node = np.flatnonzero(stood[up] & (forest.parent >= 0))
    return node, stood[node].astype(np.float64), child


def _uncontested(forest: DraftForest, node: Int, stood: Double, child: Int, drafters: Int) -> NDArray[np.bool_]:
    """False for a node that fell because another drafter's better one stood: it was not asked."""
    estimate = forest.estimate
    assert estimate is not None
    winner = child[_up(forest)[node]]
    beaten = (winner >= 0) & (drafters[winner] != drafters[node]) & (estimate[winner] > estimate[node])
    return (stood > 0) | ~beaten


def _buckets(confidence: NDArray[np.float32] | None, count: int) -> Int:
    if confidence is None:
        return np.full(count, UNSURE, dtype=np.int64)
    return np.where(np.isnan(confidence), UNSURE, np.searchsorted(EDGES, confidence))


def _sigmoid(x: Double) -> Double:
    return 1.0 / (1.0 + np.exp(-x))


_CLASS = np.searchsorted(DEPTHS, np.arange(DEPTHS[-1] + 2))  # depth -> class
_BOUNDS = np.concatenate(([0.0], EDGES, [1.0]))
_PRIOR = np.tile(np.append((_BOUNDS[1:] + _BOUNDS[:-1]) / 2, LATER_PRIOR), (len(DEPTHS) + 1, 1))
_PRIOR[0, UNSURE] = FIRST_PRIOR
