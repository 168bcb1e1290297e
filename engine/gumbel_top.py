"""The n best of a Gumbel-max race: top-n of scores[v] + gumbel(address, v), and of the plain scores where there is no noise.

With the target's noise these are the children of a coupled draft node (core.md B.13); with draft noise and scores = log q they
are a draw of n distinct tokens from q (Gumbel top-n; Kool et al., "Stochastic Beams and Where to Find Them",
arXiv 1903.06059), in the order in which they were drawn. On a CPU only tokens that can come in get noise, as in
engine/gumbel_max.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from engine.gumbel_max import Address, distinct_blocks
from engine.noise import GUMBEL_MAX, block_words, gumbel, gumbel_at, to_gumbel

Ranked = tuple[list[int], list[float]]  # tokens, best first, and what each reached


def gumbel_top(scores: Tensor, addresses: Sequence[Address | None], count: int) -> list[Ranked]:
    """The best `count` tokens of each row of scores [M, V] (fewer where fewer are allowed), row i perturbed by addresses[i].

    None: no noise. A row that holds NaN or +inf, or nothing finite, gives none. Ties go to the lowest id.
    """
    if scores.device.type == "cpu":
        values = scores.float().numpy()
        return [
            _top(row, count) if address is None else _race(row, address, count)
            for row, address in zip(values, addresses, strict=True)
        ]
    return top_by_noise_for_all(scores, addresses, count)


def top_by_noise_for_all(scores: Tensor, addresses: Sequence[Address | None], count: int) -> list[Ranked]:
    """The same with noise for every token, all rows at once: what a GPU runs."""
    perturbed = scores.float()
    noisy = [i for i, address in enumerate(addresses) if address is not None]
    if noisy:
        rows = torch.tensor(noisy, device=scores.device)
        seeds, samples, positions, streams = zip(
            *((a.seed, a.sample, a.position, a.stream) for a in addresses if a is not None), strict=True
        )
        tokens = torch.arange(scores.shape[1], device=scores.device).expand(len(noisy), -1)
        perturbed = perturbed.index_add(0, rows, gumbel(seeds, samples, positions, tokens, stream=streams))
    best, ids = perturbed.topk(min(count, scores.shape[1]), dim=-1)
    ranked: list[Ranked] = []
    for row_ids, row in zip(ids.tolist(), best.tolist(), strict=True):
        finite = sum(map(isfinite, row)) if isfinite(row[0]) else 0  # NaN and infinity come first
        ranked.append((row_ids[:finite], row[:finite]))
    return ranked


def _top(row: np.ndarray, count: int) -> Ranked:
    """By repeated argmax: 3 us for 49,152 scores where a partition takes 400."""
    row = row.copy()
    tokens: list[int] = []
    values: list[float] = []
    while len(tokens) < count:
        best = int(row.argmax())
        value = float(row[best])
        if not np.isfinite(value):
            break
        tokens.append(best)
        values.append(value)
        row[best] = -np.inf
    return tokens, values


def _race(row: np.ndarray, address: Address, count: int) -> Ranked:
    favourites, scores = _top(row, count)
    if not favourites:
        return [], []
    # `count` tokens reach the worst of these (less a slack for rounding), so who cannot is out.
    reached = [
        score + gumbel_at(address.seed, address.sample, address.position, token, address.stream)
        for token, score in zip(favourites, scores, strict=True)
    ]
    bar = np.float32(min(reached) - 1e-2 - 1e-6 * abs(scores[0])) if len(favourites) == count else np.float32(-np.inf)
    tokens = np.flatnonzero(row >= max(bar - np.float32(GUMBEL_MAX), np.finfo(np.float32).min))
    entered = row[tokens]
    blocks, place = distinct_blocks(tokens)
    words = block_words(address.seed, address.sample, address.position, blocks, address.stream)
    bits = words[tokens & 3, place] >> 8
    # -log(-log U) <= -log(1 - U): who reaches the bar has 1 - U <= exp(score - bar). Few are left to take logarithms of.
    odds = np.exp(np.minimum(entered - bar, np.float32(0)))
    left = np.flatnonzero((2**24 - bits).astype(np.float32) <= odds * 2**24 + 0.5)  # see gumbel_max: the half is no float32
    perturbed = entered[left] + to_gumbel(torch.from_numpy(bits[left].view(np.int32))).numpy()
    order = np.argsort(-perturbed, kind="stable")[:count]
    return tokens[left[order]].tolist(), perturbed[order].tolist()
