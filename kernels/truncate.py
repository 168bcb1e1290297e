"""top_k, then top_p, then min_p, without a sort: the last score that stays is found digit by digit.

A score and its id make one number whose order is (score, lowest id first), so no two are equal and no tie needs care. A round
sums the weights (ones, or probabilities) that lie at or above 16 pivots, and the next round looks between two of them: 13
rounds reach the threshold. A row is split over programs where there are few rows. Weights are integers, whose sums do not
depend on their order: neither the split nor the batch can move a threshold.

It is not FlashInfer's rejection sampling (arXiv 2501.01005), which draws without a threshold: draws here follow addressed noise,
and rejection rules want the law itself. Twin: kernels.reference_sampling.truncate_.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sample import multiprocessors

TILE = 512
TILE_INTERPRETED = 4096  # the interpreter pays by the operation, not by the element
ROUNDS = (32 + 20) // 4  # bits of a score and of an id, over those of a digit
MOST_TOKENS = 1 << 20
MOST_SPLITS = 128


@triton.jit
def _rank(score, ids):
    """int64, greater for what comes first: by score (no NaN; -0 is 0), then by lower id."""
    bits = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)
    key = bits.to(tl.int64) & 0xFFFFFFFF
    key = tl.where(bits < 0, 0xFFFFFFFF - key, key + 0x80000000)
    return (key << 20) + (1048575 - ids)


@triton.jit
def _weight(score, peak, MASS: tl.constexpr):
    """int64: 1, or the probability relative to the best in units of 2^-42; a million of them do not overflow."""
    if MASS:
        return (tl.exp(score - peak).to(tl.float64) * 4398046511104.0).to(tl.int64)
    else:
        return (score == score).to(tl.int64)


@triton.jit
def _peak(peaks, row, splits, SPLITS: tl.constexpr):
    ids = tl.arange(0, SPLITS)
    return tl.max(tl.load(peaks + row * splits + ids, mask=ids < splits, other=float("-inf")), axis=0)


@triton.jit
def _peaks(scores, peaks, stride, vocab, part, TILE: tl.constexpr):  # scores [M, V] -> peaks [M, splits]; NaN counts as +inf
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    best = tl.full([], float("-inf"), tl.float32)
    for first in range(split * part, tl.minimum(split * part + part, vocab), TILE):
        ids = first + tl.arange(0, TILE)
        score = tl.load(scores + row * stride + ids, mask=ids < vocab, other=float("-inf"))
        best = tl.maximum(best, tl.max(tl.where(score != score, float("inf"), score), axis=0))
    tl.store(peaks + row * tl.num_programs(1) + split, best)


@triton.jit
def _low(low, sums, wanted, row, shift, splits, SPLITS: tl.constexpr):
    """The threshold's digits so far [M], from those before and the sums [M, splits, 16] of the last round."""
    ids = tl.arange(0, SPLITS)[:, None]
    pivot = tl.arange(0, 16)
    parts = tl.load(sums + (row * splits + ids) * 16 + pivot[None, :], mask=ids < splits, other=0)
    enough = tl.sum(parts, axis=0).to(tl.float64) >= wanted
    digit = tl.max(tl.where(enough, pivot, 0), axis=0).to(tl.int64)
    return tl.load(low + row) + (digit << shift)


@triton.jit
def _wanted(amount, totals, row, splits, MASS: tl.constexpr, SPLITS: tl.constexpr):
    """How much must lie at or above the threshold: top_k tokens, or top_p of what top_k kept. 0: everything stays."""
    share = tl.load(amount + row).to(tl.float64)
    if MASS:
        ids = tl.arange(0, SPLITS)
        total = tl.sum(tl.load(totals + row * splits + ids, mask=ids < splits, other=0), axis=0)
        wanted = tl.maximum(share * total.to(tl.float64), 1.0)  # at least the best stays
        return tl.where(share < 1.0, wanted, 0.0)
    else:
        return share


@triton.jit(do_not_specialize=["splits"])
def _total(scores, peaks, floor, totals, stride, vocab, part, splits, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """floor [M] -> totals [M, splits]: the mass that top_k kept."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak = _peak(peaks, row, splits, SPLITS)
    lowest = tl.load(floor + row)
    total = tl.zeros([], tl.int64)
    if tl.abs(peak) < float("inf"):
        for first in range(split * part, tl.minimum(split * part + part, vocab), TILE):
            ids = first + tl.arange(0, TILE)
            score = tl.load(scores + row * stride + ids, mask=ids < vocab, other=float("-inf"))
            total += tl.sum(tl.where(_rank(score, ids) >= lowest, _weight(score, peak, True), 0), axis=0)
    tl.store(totals + row * splits + split, total)


@triton.jit(do_not_specialize=["splits", "shift"])
def _round(
    scores,  # [M, V] float32
    peaks,  # [M, splits]
    amount,  # [M]: top_k, or top_p
    totals,  # [M, splits], for top_p
    floor,  # [M]: the threshold of top_k, for top_p
    low,  # [M]: the digits known before the last round
    sums,  # [M, splits, 16] of the last round
    next_low,  # as low and sums, of this one
    next_sums,
    stride,
    vocab,
    part,
    splits,
    shift,
    FIRST: tl.constexpr,
    MASS: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak = _peak(peaks, row, splits, SPLITS)
    wanted = _wanted(amount, totals, row, splits, MASS, SPLITS)
    if (tl.abs(peak) < float("inf")) & (wanted > 0):
        if FIRST:
            base = tl.zeros([], tl.int64)
        else:
            base = _low(low, sums, wanted, row, shift + 4, splits, SPLITS)
        lowest = tl.load(floor + row)
        pivots = base + (tl.arange(0, 16).to(tl.int64) << shift)
        above = tl.zeros([16], tl.int64)
        for first in range(split * part, tl.minimum(split * part + part, vocab), TILE):
            ids = first + tl.arange(0, TILE)
            score = tl.load(scores + row * stride + ids, mask=ids < vocab, other=float("-inf"))
            rank = _rank(score, ids)
            weight = tl.where((ids < vocab) & (rank >= lowest), _weight(score, peak, MASS), 0)
            above += tl.sum(tl.where(rank[:, None] >= pivots[None, :], weight[:, None], 0), axis=0)
        tl.store(next_sums + (row * splits + split) * 16 + tl.arange(0, 16), above)
        if split == 0:
            tl.store(next_low + row, base)


@triton.jit(do_not_specialize=["splits"])
def _settle(peaks, amount, totals, low, sums, out, splits, MASS: tl.constexpr, SPLITS: tl.constexpr):
    """The last round's digit: out [M], 0 where everything stays."""
    row = tl.program_id(0).to(tl.int64)
    peak = _peak(peaks, row, splits, SPLITS)
    wanted = _wanted(amount, totals, row, splits, MASS, SPLITS)
    if (tl.abs(peak) < float("inf")) & (wanted > 0):
        tl.store(out + row, _low(low, sums, wanted, row, 0, splits, SPLITS))


@triton.jit(do_not_specialize=["splits"])
def _cut(scores, peaks, floor, min_p, stride, vocab, part, splits, SPLITS: tl.constexpr, TILE: tl.constexpr):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    peak = _peak(peaks, row, splits, SPLITS)
    lowest = tl.load(floor + row)
    share = tl.load(min_p + row)
    if (tl.abs(peak) < float("inf")) & ((lowest > 0) | (share > 0)):
        least = (peak.to(tl.float64) + tl.log(share)).to(tl.float32)  # -inf where min_p is 0
        for first in range(split * part, tl.minimum(split * part + part, vocab), TILE):
            ids = first + tl.arange(0, TILE)
            score = tl.load(scores + row * stride + ids, mask=ids < vocab, other=float("-inf"))
            gone = (_rank(score, ids) < lowest) | (score < least)
            tl.store(scores + row * stride + ids, tl.full([TILE], float("-inf"), tl.float32), mask=gone & (ids < vocab))


def truncate_(
    scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, *, use_k: bool = True, use_p: bool = True, splits: int = 0
) -> Tensor:
    """What top_k, then top_p, then min_p do not keep becomes -inf, in place. A row that holds NaN or +inf, or nothing finite,
    is left as it is. Nothing waits for the device.

    scores [M, V] float32, last dimension contiguous, rows of any stride; top_k [M] int32 (0: all), top_p [M] float64 (1: all),
    min_p [M] float64 (0: all). use_k, use_p False: nobody asks for it, which spares 14 launches each. splits: parts of a row,
    0 for as many as fill the device; the result does not depend on it. Raises ValueError for more than 2^20 columns.
    """
    rows, vocab = scores.shape
    if vocab > MOST_TOKENS:
        raise ValueError(f"a vocabulary of {vocab} is more than {MOST_TOKENS}")
    if not rows:
        return scores
    search = _Search(scores, splits)
    floor = torch.zeros(rows, dtype=torch.int64, device=scores.device)
    if use_k:
        search.threshold(top_k, floor, mass=False)
    if use_p:
        search.threshold(top_p, floor, mass=True)
    search.launch(_cut, floor, min_p, *search.shape)
    return scores


class _Search:
    """One call's buffers and launches."""

    def __init__(self, scores: Tensor, splits: int) -> None:
        self.scores = scores
        rows, vocab = scores.shape
        self.tile = TILE if scores.is_cuda else min(TILE_INTERPRETED, max(16, triton.next_power_of_2(vocab)))
        tiles = triton.cdiv(vocab, self.tile)
        wanted = min(splits or max(1, multiprocessors(scores.device) // rows), tiles, MOST_SPLITS)
        part = triton.cdiv(tiles, wanted) * self.tile
        self.rows, self.splits = rows, triton.cdiv(vocab, part)
        self.shape = (scores.stride(0), vocab, part, self.splits)
        self.peaks = torch.empty(rows, self.splits, dtype=torch.float32, device=scores.device)
        self.totals = self._integers(self.splits)
        self.low = self._integers(2)
        self.sums = self._integers(2 * self.splits * 16)
        _peaks[(rows, self.splits)](scores, self.peaks, *self.shape[:3], TILE=self.tile, num_warps=4)

    def launch(self, kernel: triton.JITFunction, *args: object, warps: int = 4, **flags: object) -> None:
        grid = (self.rows, self.splits)
        kernel[grid](self.scores, self.peaks, *args, **flags, SPLITS=MOST_SPLITS, TILE=self.tile, num_warps=warps)

    def threshold(self, amount: Tensor, floor: Tensor, mass: bool) -> None:
        """Raise floor [M] to the threshold that `amount` sets among what lies above it."""
        if mass:
            self.launch(_total, floor, self.totals, *self.shape)
        low, sums = self.low.view(2, -1), self.sums.view(2, -1)  # of the last round, and of this one
        for i in range(ROUNDS):
            last, this = (i + 1) % 2, i % 2
            buffers = (amount, self.totals, floor, low[last], sums[last], low[this], sums[this])
            shift = 4 * (ROUNDS - 1 - i)
            self.launch(_round, *buffers, *self.shape, shift, warps=8, FIRST=i == 0, MASS=mass)
        this = (ROUNDS - 1) % 2
        flags = {"MASS": mass, "SPLITS": MOST_SPLITS}
        _settle[(self.rows,)](self.peaks, amount, self.totals, low[this], sums[this], floor, self.splits, **flags, num_warps=4)

    def _integers(self, columns: int) -> Tensor:
        return torch.empty(self.rows * columns, dtype=torch.int64, device=self.scores.device)
