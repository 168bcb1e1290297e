"""Longest-suffix match in a batch of texts: what followed these tokens the last time, as a chain of drafts.

Prompt lookup as engine/drafters/ngram.py does it, without an index: every earlier position of every text is compared with the
text's end, a tile of positions at a time, and hardly any survives its first token. It reads a text once, 4 bytes a token.
Twin: kernels.reference_ngram.ngram_draft.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sample import multiprocessors

TILE = 1024
MOST_SPLITS = 512


@triton.jit(do_not_specialize=["splits"])
def _longest(texts, lengths, found, stride, part, splits, min_n, max_n, TILE: tl.constexpr):
    """found [B, splits]: matched tokens * 2^32 + the position right behind them, of the longest match and the latest of those."""
    text, split = tl.program_id(0), tl.program_id(1)
    own = texts + text.to(tl.int64) * stride
    length = tl.load(lengths + text)
    best = tl.zeros([], tl.int64)
    for first in range(split * part + 1, tl.minimum(split * part + part + 1, length), TILE):
        end = first + tl.arange(0, TILE)
        alive = end < length
        matched = tl.zeros([TILE], tl.int32)
        j = tl.zeros([], tl.int32)
        going = tl.full([], 1, tl.int32)
        while going != 0:
            last = tl.load(own + length - 1 - j)
            alive = alive & (j < end)
            alive = alive & (tl.load(own + end - 1 - j, mask=alive, other=-1) == last)
            matched += alive.to(tl.int32)
            j += 1
            going = tl.where(j < max_n, tl.max(alive.to(tl.int32), axis=0), 0)
        best = tl.maximum(best, tl.max(tl.where(matched >= min_n, (matched.to(tl.int64) << 32) + end, 0), axis=0))
    tl.store(found + text * splits + split, best)


@triton.jit(do_not_specialize=["splits"])
def _continue(
    texts, lengths, budgets, found, chains, counts, matches, stride, splits, width, trust, S: tl.constexpr, W: tl.constexpr
):
    text = tl.program_id(0)
    own = texts + text.to(tl.int64) * stride
    length = tl.load(lengths + text)
    parts = tl.arange(0, S)
    best = tl.max(tl.load(found + text * splits + parts, mask=parts < splits, other=0), axis=0)
    matched = (best >> 32).to(tl.int32)
    start = (best & 0xFFFFFFFF).to(tl.int32)
    count = tl.minimum(tl.minimum(tl.load(budgets + text), width), trust * matched - 1)
    count = tl.where(matched > 0, tl.maximum(count, 0), 0)
    i = tl.arange(0, W)
    # Behind the end of the text the chain goes on with itself: a repetition is followed as far as the budget reaches.
    period = tl.maximum(length - start, 1)
    chain = tl.load(own + start + i % period, mask=i < count, other=-1)
    tl.store(chains + text * width + i, chain, mask=i < width)
    tl.store(counts + text, count)
    tl.store(matches + text, matched)


def ngram_draft(
    texts: Tensor, lengths: Tensor, budgets: Tensor, width: int, min_n: int = 1, max_n: int = 16, trust: int = 2, splits: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """(chains [B, width] padded with -1, counts [B], matched [B]), all int32: for every text the continuation of the earlier
    occurrence that shares the most last tokens with its end (the latest of several), at least min_n and counted up to max_n.

    texts [B, L] int32, last dimension contiguous, of which lengths [B] int32 tokens count (0: an empty text, no draft);
    budgets [B] int32: most tokens drafted; a match of n tokens drafts at most trust * n - 1. splits: parts of a text, 0 for as
    many as fill the device; the result does not depend on it. Nothing waits for the device.
    """
    count, longest = texts.shape
    device = texts.device
    chains = torch.empty(count, width, dtype=torch.int32, device=device)
    counts, matches = (torch.empty(count, dtype=torch.int32, device=device) for _ in range(2))
    if not count:
        return chains, counts, matches
    tiles = triton.cdiv(longest, TILE) or 1
    splits = min(splits or max(1, 2 * multiprocessors(device) // count), tiles, MOST_SPLITS)
    part = triton.cdiv(tiles, splits) * TILE
    splits = triton.cdiv(tiles * TILE, part)
    found = torch.empty(count, splits, dtype=torch.int64, device=device)
    stride = texts.stride(0)
    _longest[(count, splits)](texts, lengths, found, stride, part, splits, min_n, max_n, TILE=TILE)
    outputs = (budgets, found, chains, counts, matches)
    tile = {"S": MOST_SPLITS, "W": triton.next_power_of_2(max(width, 1))}
    _continue[(count,)](texts, lengths, *outputs, stride, splits, width, trust, **tile, num_warps=1)
    return chains, counts, matches
