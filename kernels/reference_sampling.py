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
