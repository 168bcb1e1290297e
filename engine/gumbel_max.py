"""The Gumbel-max draw: argmax over v of scores[v] + gumbel(seed, sample, position, v) is a sample of softmax(scores).

On a CPU only the tokens that can win get noise: Gumbel noise of 24-bit uniforms never exceeds `GUMBEL_MAX`, so a token that
lies further than that below an achieved value has lost. On real logits (SmolLM2-135M, 87 rows, V = 49,152) the median row
keeps 4,800 tokens at T = 1 and 450 at T = 0.7, and the mean row takes 0.30 and 0.15 ms where noise for all takes 0.44. The
result is bit for bit that of noise for every token, because noise is addressed (engine/noise.py). It is not a softmax: the
normaliser cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor

from engine import device_rules
from engine.noise import GUMBEL_MAX, TARGET, block_words, gumbel, gumbel_at, to_gumbel
from engine.peaks import knows_peaks, top

# The bound rests on the tokens this close to the best score (7 in the mean row at T = 1), at most so many.
NEAR, NEAR_MOST = 3.0, 4
SMALL = 1024  # blocks; larger draws compute their noise alone, which costs half as much a block
UNUSABLE = -1  # no token: the row holds NaN or infinity, or nothing is allowed


@dataclass(frozen=True, slots=True)
class Address:
    """Where one row's noise lies; `position` counts output tokens from 0, `stream` is one of engine/noise.py."""

    seed: int
    sample: int
    position: int
    stream: int = TARGET


def gumbel_argmax(scores: Tensor, rows: Sequence[int], addresses: Sequence[Address]) -> list[int]:
    """One token per address: address i judges scores[rows[i]]. Ties go to the lowest id; UNUSABLE for an unusable row.

    scores [M, V], any float type, compared in float32.
    """
    if not rows:
        return []
    if scores.device.type == "cpu":
        return _argmax_cpu(scores, rows, addresses)
    if device_rules.has_kernels(scores.device):
        return device_rules.draw(scores, rows, [(a.seed, a.sample, a.position, a.stream) for a in addresses])
    seeds, samples, positions, streams = zip(*((a.seed, a.sample, a.position, a.stream) for a in addresses), strict=True)
    index = torch.tensor(rows, device=scores.device)
    tokens = torch.arange(scores.shape[1], device=scores.device).expand(len(rows), -1)
    return first_argmax(scores[index].float() + gumbel(seeds, samples, positions, tokens, stream=streams))


def first_argmax(scores: Tensor) -> list[int]:
    """The lowest id of the largest score of each row of [M, V]; UNUSABLE where that score is not finite (NaN wins a max)."""
    if knows_peaks(scores):
        ids, values = top(scores, 1)
        return [int(i) if isfinite(value) else UNUSABLE for (i,), (value,) in zip(ids.tolist(), values.tolist(), strict=True)]
    if scores.device.type == "cpu":
        # numpy's float32 argmax takes 3 us for 49,152 where torch's takes 30 (bfloat16: 165); a float copy costs 4.
        found: list[int] = []
        for first in range(0, len(scores), 8):
            block = scores[first : first + 8].float().numpy()
            ids = block.argmax(axis=1)
            best = np.take_along_axis(block, ids[:, None], axis=1)[:, 0]
            found += np.where(np.isfinite(best), ids, UNUSABLE).tolist()
        return found
    values, index = scores.max(dim=-1)
    return [int(token) for token in torch.where(torch.isfinite(values), index, UNUSABLE).tolist()]


@dataclass(frozen=True, slots=True)
class _Draw:
    """One row's race: the tokens that can win, ascending, their scores, and a value that is surely achieved, less a slack."""

    index: int
    address: Address
    tokens: np.ndarray
    values: np.ndarray
    achieved: float

    @classmethod
    def enter(cls, index: int, address: Address, scores: np.ndarray) -> _Draw | None:
        """None for an unusable row."""
        top = int(scores.argmax())
        peak = float(scores[top])
        if not np.isfinite(peak):
            return None
        slack = 1e-2 + 1e-6 * abs(peak)  # covers every rounding between this bound and the float32 sums compared in the end
        achieved = peak + _noise_at(address, top) - slack
        tokens = np.flatnonzero(scores >= np.float32(achieved - GUMBEL_MAX))
        values = scores[tokens]
        for i in np.flatnonzero(values >= peak - NEAR)[:NEAR_MOST].tolist():
            achieved = max(achieved, float(values[i]) + _noise_at(address, int(tokens[i])) - slack)
        within = values >= np.float32(achieved - GUMBEL_MAX)
        return cls(index, address, tokens[within], values[within], achieved)

    def winner(self, bits: np.ndarray) -> int:
        """The winner, given the noise bits of `tokens`.

        From -log(-log U) <= -log(1 - U): whoever achieves the value has 1 - U <= exp(score - achieved). That leaves a handful of
        tokens to take logarithms of.
        """
        odds = np.exp(np.minimum(self.values - np.float32(self.achieved), np.float32(0)))
        # 2^24 - 0.5 is no float32: the half stands on the side where it costs nothing, or the largest noises would miss the mark.
        left = np.flatnonzero((2**24 - bits).astype(np.float32) <= odds * 2**24 + 0.5)
        perturbed = self.values[left] + to_gumbel(torch.from_numpy(bits[left].view(np.int32))).numpy()
        return int(self.tokens[left[perturbed.argmax()]])


def _argmax_cpu(scores: Tensor, rows: Sequence[int], addresses: Sequence[Address]) -> list[int]:
    chosen = [UNUSABLE] * len(rows)
    small: list[tuple[_Draw, np.ndarray, np.ndarray]] = []
    for i, (row, address) in enumerate(zip(rows, addresses, strict=True)):
        draw = _Draw.enter(i, address, scores[row].float().numpy())
        if draw is None:
            continue
        blocks, place = distinct_blocks(draw.tokens)
        if len(blocks) <= SMALL:
            small.append((draw, blocks, place))
        else:
            words = block_words(address.seed, address.sample, address.position, blocks, address.stream)
            chosen[i] = draw.winner(_pick(words, draw.tokens, place))
    # A call for a few hundred blocks is all overhead: small draws share one.
    words = _words_together(small)
    first = 0
    for draw, blocks, place in small:
        chosen[draw.index] = draw.winner(_pick(words, draw.tokens, place + first))
        first += len(blocks)
    return chosen


def _words_together(draws: list[tuple[_Draw, np.ndarray, np.ndarray]]) -> np.ndarray:
    """The words [4, N] of the blocks of all draws."""
    if not draws:
        return np.empty((4, 0), dtype=np.uint32)
    addresses = [(draw.address.seed, draw.address.sample, draw.address.position, draw.address.stream) for draw, _, _ in draws]
    if len(draws) == 1:
        seed, sample, position, stream = addresses[0]
        return block_words(seed, sample, position, draws[0][1], stream)
    sizes = [len(blocks) for _, blocks, _ in draws]
    seeds, samples, positions, streams = np.repeat(np.array(addresses, dtype=np.uint64).T, sizes, axis=1)
    return block_words(seeds, samples, positions, np.concatenate([blocks for _, blocks, _ in draws]), streams)


def _pick(words: np.ndarray, tokens: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The 24 noise bits of tokens whose blocks lie at `place` in words [4, N]."""
    bits: np.ndarray = words.reshape(-1).take((tokens & 3) * words.shape[1] + place) >> 8
    return bits


def distinct_blocks(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct blocks of four of ascending tokens, and the place of each token's block among them."""
    block = tokens >> 2
    new = np.empty(len(block), dtype=bool)
    new[0] = True
    np.not_equal(block[1:], block[:-1], out=new[1:])
    return block[new].astype(np.uint64), new.cumsum() - 1


def _noise_at(address: Address, token: int) -> float:
    return gumbel_at(address.seed, address.sample, address.position, token, address.stream)
