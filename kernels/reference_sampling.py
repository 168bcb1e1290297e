"""The plain-torch twins of the sampling kernels: what is "correct" there. kernels/reference.py holds those of the model.

Legend: M rows of scores, V vocabulary, R judged addresses, B trees (or texts), N their nodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNUSABLE = -1
MASK = 0xFFFFFFFF


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """One Philox4x32-10 block per element of int64 tensors that hold 32-bit values: four words."""
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & MASK, p1 & MASK, ((p0 >> 32) ^ c3 ^ k1) & MASK, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def gumbel_noise(seeds: Tensor, samples: Tensor, positions: Tensor, streams: Tensor, vocab: int) -> Tensor:
    """float32 [R, vocab]: the noise of engine/noise.py at R addresses."""
    token = torch.arange(vocab, device=seeds.device)
    sample, position, stream = (t.long()[:, None] & MASK for t in (samples, positions, streams))
    words = philox(token >> 2, position, sample, stream, seeds[:, None] & MASK, seeds[:, None] >> 32 & MASK)
    lanes = torch.stack([word.expand(len(seeds), vocab) for word in words])
    bits = lanes.gather(0, (token & 3).expand(1, len(seeds), vocab))[0] >> 8
    return bits.double().add_(0.5).mul_(2.0**-24).log_().neg_().log_().neg_().float()


def gumbel_argmax(
    scores: Tensor, rows: Tensor, noisy: Tensor, seeds: Tensor, samples: Tensor, positions: Tensor, streams: Tensor
) -> Tensor:
    """argmax of scores[rows] [R, V] in float32, plus noise where noisy [R]: int32 [R], UNUSABLE where the best is not finite."""
    noise = gumbel_noise(seeds, samples, positions, streams, scores.shape[1])
    reached = scores[rows.long()].float() + torch.where(noisy[:, None], noise, 0.0)
    values = reached.amax(-1)
    return torch.where(values.isfinite(), (reached == values[:, None]).int().argmax(-1), UNUSABLE).int()


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
    """Bias and penalise scores[rows[e], tokens[e]] in place; entries with counts[e] < 0 are biased only."""
    at = (rows.long(), tokens.long())
    biased = torch.where(bias == -torch.inf, bias, scores[at] + bias)
    r, p, f = (penalty[at[0]] for penalty in (repetition, presence, frequency))
    penalised = torch.where(biased > 0, biased / r, biased * r) - (f * counts + p * (counts > 0))
    scores[at] = torch.where(counts >= 0, penalised, biased)
    return scores


def shape_scores(logits: Tensor, temperature: Tensor, allowed: Tensor | None = None, mask_row: Tensor | None = None) -> Tensor:
    """logits [M, V] / temperature [M] (0: as they are) in float32, -inf where the row's mask in allowed [K, V / 32] says no."""
    heat = torch.where(temperature > 0, temperature, 1.0)[:, None]
    scores = logits.float() / heat
    if allowed is not None and mask_row is not None:
        token = torch.arange(logits.shape[1], device=logits.device)
        bits = allowed[mask_row.clamp(min=0).long()][:, token // 32] >> (token % 32).int() & 1
        scores.masked_fill_((bits == 0) & (mask_row >= 0)[:, None], -torch.inf)
    return scores


def truncate_(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """top_k [M] (0: all), then top_p [M], then min_p [M] on float32 scores [M, V], in place; see engine/truncation.py.

    A row that holds NaN or +inf, or nothing finite, is left as it is.
    """
    peak = scores.amax(-1, keepdim=True)
    best, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device)
    kept = (rank < top_k[:, None]) | (top_k[:, None] <= 0)
    mass = torch.where(kept, (best - peak).exp().double(), 0.0)
    before = mass.cumsum(-1) - mass
    share = top_p[:, None]
    kept &= (before < share * mass.sum(-1, keepdim=True)) | (share >= 1) | (rank == 0)
    kept &= best >= (peak.double() + min_p[:, None].log()).float()
    keep = torch.empty_like(kept).scatter_(1, order, kept)
    return scores.masked_fill_(~keep & peak.isfinite(), -torch.inf)
