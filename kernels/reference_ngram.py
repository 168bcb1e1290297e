"""The plain-torch twin of kernels.ngram_match: what is "correct" there."""

from __future__ import annotations

import torch
from torch import Tensor


def ngram_draft(
    texts: Tensor, lengths: Tensor, budgets: Tensor, width: int, min_n: int = 1, max_n: int = 16, trust: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """(chains [B, width] padded with -1, counts [B], matched [B]) of texts [B, L]; every earlier position is tried."""
    chains = torch.full((len(texts), width), -1, dtype=torch.int32)
    found = torch.zeros(2, len(texts), dtype=torch.int32)
    for b, (size, budget) in enumerate(zip(lengths.tolist(), budgets.tolist(), strict=True)):
        text = texts[b, :size].tolist()
        matched, start = max(((shared(text, end, max_n), end) for end in range(1, size)), default=(0, 0))
        if matched < max(min_n, 1):
            continue
        count = max(min(budget, width, trust * matched - 1), 0)
        chain = [text[start + i % (size - start)] for i in range(count)]
        chains[b, :count] = torch.tensor(chain, dtype=torch.int32)
        found[:, b] = torch.tensor([count, matched])
    counts, matches = found.to(texts.device)
    return chains.to(texts.device), counts, matches


def shared(text: list[int], end: int, most: int) -> int:
    """How many tokens right before `end` equal the text's last ones, up to `most`."""
    length = 0
    while length < min(end, most) and text[end - 1 - length] == text[-1 - length]:
        length += 1
    return length
