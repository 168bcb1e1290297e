"""The target law but for its truncation (kernels/truncate.py): sparse edits of logits, then masks and temperature.

In the order of engine/target_law.py: logit_bias, what is not allowed, penalties, temperature. The edits touch the tokens that
a request names or has seen, not the vocabulary; what a mask forbids is -inf whatever was added to it, so it may come last.
Twins: kernels.reference_sampling.edit_ and shape_scores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit(do_not_specialize=["entries"])
def _edit(scores, rows, tokens, bias, counts, repetition, presence, frequency, stride, entries, TILE: tl.constexpr):
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    held = ids < entries
    row = tl.load(rows + ids, mask=held, other=0).to(tl.int64)
    place = scores + row * stride + tl.load(tokens + ids, mask=held, other=0)
    added = tl.load(bias + ids, mask=held, other=0.0)
    count = tl.load(counts + ids, mask=held, other=-1.0)
    score = tl.load(place, mask=held, other=0.0)
    score = tl.where(added == float("-inf"), added, score + added)
    repeated = tl.load(repetition + row, mask=held, other=1.0)
    seen = tl.where(score > 0, tl.div_rn(score, repeated), score * repeated)
    present = tl.where(count > 0, tl.load(presence + row, mask=held, other=0.0), 0.0)
    seen = seen - (tl.load(frequency + row, mask=held, other=0.0) * count + present)
    tl.store(place, tl.where(count >= 0, seen, score), mask=held)


@triton.jit
def _shape(logits, temperature, allowed, mask_row, out, vocab, stride, words, MASKED: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held = ids < vocab
    score = tl.load(logits + row * stride + ids, mask=held, other=0.0).to(tl.float32)
    heat = tl.load(temperature + row)
    score = tl.where(heat > 0, tl.div_rn(score, tl.where(heat > 0, heat, 1.0)), score)
    if MASKED:
        mask = tl.load(mask_row + row).to(tl.int64)
        if mask >= 0:
            word = tl.load(allowed + mask * words + ids // 32, mask=held, other=0)
            score = tl.where(((word >> (ids % 32)) & 1) != 0, score, float("-inf"))
    tl.store(out + row * vocab + ids, score, mask=held)


def edit_(
    scores: Tensor,
    rows: Tensor,
    tokens: Tensor,
    bias: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """Bias and penalise single scores in place; scores [M, V] float32, last dimension contiguous.

    Entry e changes scores[rows[e], tokens[e]], no two entries the same: bias[e] is added (-inf forbids the token), and then,
    where counts[e] >= 0, the penalties of the row apply to a token that occurs counts[e] times in the output (0: in the prompt
    alone). rows, tokens [E] int32; bias, counts [E] float32; repetition, presence, frequency [M] float32 (1, 0, 0: none).
    """
    if len(rows):
        penalties = (repetition, presence, frequency)
        # No fused multiply-add: the penalties are rounded as they are on the CPU.
        _edit[(triton.cdiv(len(rows), 256),)](
            scores, rows, tokens, bias, counts, *penalties, scores.stride(0), len(rows), TILE=256, enable_fp_fusion=False
        )
    return scores


def shape_scores(logits: Tensor, temperature: Tensor, allowed: Tensor | None = None, mask_row: Tensor | None = None) -> Tensor:
    """float32 scores [M, V]: logits / temperature, -inf where not allowed; temperature 0 (greedy) leaves logits as they are.

    logits [M, V] of any float type, last dimension contiguous, rows of any stride; temperature [M] float32. allowed
    [K, ceil(V / 32)] int32: bit t % 32 of word t // 32 allows token t; mask_row [M] int32: the row's mask, -1 for none.
    """
    rows, vocab = logits.shape
    out = torch.empty(rows, vocab, dtype=torch.float32, device=logits.device)
    if rows:
        masked = allowed is not None
        masks, chosen, words = (allowed, mask_row, allowed.shape[1]) if allowed is not None else (out, out, 0)
        grid = (rows, triton.cdiv(vocab, TILE))
        _shape[grid](logits, temperature, masks, chosen, out, vocab, logits.stride(0), words, MASKED=masked, TILE=TILE)
    return out
