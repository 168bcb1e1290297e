"""The target's own token behind every row: argmax of score + Gumbel noise at the row's address, or plain argmax.

Gumbel-max with addressed noise (core.md J.4). A row is split over several programs where there are few rows; the maximum of
the parts is exact, so the answer depends on nothing but the row and its address. Nearly all tokens are told from the winner
without a logarithm: -log(-log U) <= -log(1 - U), so who beats an achieved value has 1 - U <= exp(score - achieved).
Twin: kernels.reference_sampling.gumbel_argmax.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.philox import LARGEST, gumbel, noise_bits

TILE = 1024
MOST_SPLITS = 512
UNUSABLE = -1  # no token: the row holds NaN or infinity, or nothing is allowed


@triton.jit
def _race(
    scores,  # [M, V], rows of any stride
    rows,  # [R]
    noisy,  # [R], 0: plain argmax
    seeds,  # [R] int64
    samples,  # [R] int32, as the next two
    positions,
    streams,
    values,  # [R, splits]: what the best token of each part reached
    tokens,  # [R, splits]
    stride,
    vocab,
    part,  # tokens in a part, a multiple of TILE
    TILE: tl.constexpr,
):
    r = tl.program_id(0)
    split = tl.program_id(1)
    row = scores + tl.load(rows + r).to(tl.int64) * stride
    perturbed = tl.load(noisy + r) != 0
    seed, sample = tl.load(seeds + r), tl.load(samples + r)
    position, stream = tl.load(positions + r), tl.load(streams + r)
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], -1, tl.int32)
    for first in range(split * part, tl.minimum(split * part + part, vocab), TILE):
        ids = first + tl.arange(0, TILE)
        score = tl.load(row + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
        score = tl.where(score != score, float("inf"), score)  # NaN wins, and a row that is won by infinity is unusable
        top = tl.max(score, axis=0)
        if perturbed:
            if top + LARGEST > best:
                bits = noise_bits(seed, sample, position, stream, first, TILE)
                # The slack covers every rounding between this bound and the sums that are compared in the end.
                behind = score - (best - (0.01 + 1e-6 * tl.abs(best)))
                odds = tl.exp(tl.where(behind < 0, behind, 0.0))
                open_ = (16777216 - bits).to(tl.float32) <= odds * 16777216.0 + 0.5
                if tl.max(open_.to(tl.int32), axis=0) != 0:
                    reached = tl.where(open_, score + gumbel(bits), float("-inf"))
                    peak = tl.max(reached, axis=0)
                    if peak > best:
                        best = peak
                        token = tl.min(tl.where(reached == peak, ids, 2147483647), axis=0)
        else:
            if top > best:
                best = top
                token = tl.min(tl.where(score == top, ids, 2147483647), axis=0)
    place = r * tl.num_programs(1) + split
    tl.store(values + place, best)
    tl.store(tokens + place, token)


@triton.jit(do_not_specialize=["splits"])
def _winner(values, tokens, out, splits, SPLITS: tl.constexpr):  # values, tokens [R, splits] -> out [R]
    r = tl.program_id(0)
    ids = tl.arange(0, SPLITS)
    reached = tl.load(values + r * splits + ids, mask=ids < splits, other=float("-inf"))
    best = tl.max(reached, axis=0)
    first = tl.min(tl.where(reached == best, ids, SPLITS - 1), axis=0)  # parts are in order: of equal ones the lowest id
    token = tl.load(tokens + r * splits + first)
    usable = (best > float("-inf")) & (best < float("inf"))
    tl.store(out + r, tl.where(usable, token, -1))


def gumbel_argmax(
    scores: Tensor,
    rows: Tensor,
    noisy: Tensor,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
    streams: Tensor,
    splits: int = 0,
) -> Tensor:
    """One token per address, int32 [R]: address i judges scores[rows[i]]. Ties go to the lowest id; UNUSABLE (-1) for a row that
    holds NaN or infinity, or nothing finite. Nothing waits for the device.

    scores [M, V] fp32, bf16 or fp16, compared in float32, last dimension contiguous; rows [R] int32 or int64; noisy [R] bool,
    False: plain argmax; seeds [R] int64, the bits of the unsigned seed; samples, positions, streams [R] int32. splits: parts of a
    row, 0 for as many as fill the device; the answer does not depend on it.
    """
    vocab, count = scores.shape[1], len(rows)
    out = torch.empty(count, dtype=torch.int32, device=scores.device)
    if not count:
        return out
    tiles = triton.cdiv(vocab, TILE)
    splits = min(splits or max(1, 2 * multiprocessors(scores.device) // count), tiles, MOST_SPLITS)
    part = triton.cdiv(tiles, splits) * TILE
    splits = triton.cdiv(vocab, part)
    values = torch.empty(count, splits, dtype=torch.float32, device=scores.device)
    tokens = torch.empty(count, splits, dtype=torch.int32, device=scores.device)
    address = (rows, noisy.view(torch.uint8), seeds, samples, positions, streams)
    _race[(count, splits)](scores, *address, values, tokens, scores.stride(0), vocab, part, TILE=TILE, num_warps=4)
    _winner[(count,)](values, tokens, out, splits, SPLITS=MOST_SPLITS, num_warps=1)
    return out


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, at one a multiprocessor; 1 where there is no GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
