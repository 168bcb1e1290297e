"""The likeliest tokens of each row of logits.

The native kernels leave the largest logit of every 32 beside the logits, while they have them in hand. With these the top of a
row takes some microseconds; without, the row is read again (196 KB for 49,152 tokens, out of the caches by then).
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "outrider_peaks"
GROUP = 32


class _Peaks:
    """The peaks [M, panels] of a step's logits, and the longest list that was asked for."""

    def __init__(self, peaks: Tensor) -> None:
        self.peaks = peaks
        self.ids = self.values = torch.empty(len(peaks), 0)


def attach(logits: Tensor, peaks: Tensor) -> Tensor:
    """Logits [M, V] that know their peaks; what is computed from them, or a part of them, is another tensor and knows nothing."""
    setattr(logits, NAME, _Peaks(peaks))
    return logits


def top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids and values [M, k] of the largest logits [M, V], largest first."""
    peaks: _Peaks | None = getattr(logits, NAME, None)
    if peaks is None:
        return _top_in_two(logits, k)
    if k > peaks.ids.shape[1]:
        peaks.ids, peaks.values = _top_by_peaks(logits, peaks.peaks, k)
    return peaks.ids[:, :k], peaks.values[:, :k]


def _top_by_peaks(logits: Tensor, peaks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """ids, values [M, k]."""
    from kernels.cpu import native  # who has peaks has the kernels

    found, best = native.top(logits, peaks, k)
    return torch.from_numpy(found), torch.from_numpy(best)


def knows_peaks(logits: Tensor) -> bool:
    return hasattr(logits, NAME)


def _top_in_two(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The groups with the k largest peaks, then the k largest in these: torch.topk over 49,152 takes five times as long."""
    rows, size = logits.shape
    if size % GROUP or size < 4 * k * GROUP:
        values, ids = torch.topk(logits, k, dim=-1)
        return ids, values
    groups = logits.view(rows, -1, GROUP)
    chosen = groups.amax(-1).topk(k, dim=-1).indices
    near = groups.gather(1, chosen.unsqueeze(-1).expand(-1, -1, GROUP)).view(rows, -1)
    values, place = near.topk(k, dim=-1)
    return chosen.gather(1, place // GROUP) * GROUP + place % GROUP, values
