"""The plain-torch twins of the sampling kernels: what is "correct" there. kernels/reference.py holds those of the model.

Legend: M rows of scores, V vocabulary, R judged addresses, B trees (or texts), N their nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

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


def match_verify(
    scores: Tensor,
    noisy: Tensor,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
    token: Tensor,
    parent: Tensor,
    start: Tensor,
    max_nodes: int,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The match rule (engine/walk.py): nodes [B, max_depth], tokens [B, max_depth + 1], counts [B]; see kernels.verify."""
    rows = torch.arange(len(scores), device=scores.device)
    drawn = gumbel_argmax(scores, rows, noisy, seeds, samples, positions, torch.zeros_like(rows)).tolist()
    found: list[tuple[list[int], list[int]]] = []
    starts, tokens, parents = start.tolist(), token.tolist(), parent.tolist()
    for first, last in pairwise(starts):
        path, emitted, node = [0], [], 0
        while node >= 0 and drawn[first + node] != UNUSABLE:
            emitted.append(drawn[first + node])
            below = [i - first for i in range(first + 1, last) if parents[i] == node and tokens[i] == emitted[-1]]
            node = below[0] if below else -1
            path += below[:1]
        found.append((path[1 : len(emitted)], emitted))
    return padded(found, max_depth, scores.device)


def padded(found: list[tuple[list[int], list[int]]], max_depth: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Accepted nodes and emitted tokens of each tree as the kernels' tables, padded with -1."""
    nodes = torch.full((len(found), max_depth), -1, dtype=torch.int32)
    tokens = torch.full((len(found), max_depth + 1), -1, dtype=torch.int32)
    for b, (path, emitted) in enumerate(found):
        nodes[b, : len(path)] = torch.tensor(path, dtype=torch.int32)
        tokens[b, : len(emitted)] = torch.tensor(emitted, dtype=torch.int32)
    counts = torch.tensor([len(emitted) for _, emitted in found], dtype=torch.int32)
    return nodes.to(device), tokens.to(device), counts.to(device)


def coin(seed: int, sample: int, position: int, node: int) -> float:
    """A uniform number in [0, 1) of 53 bits: engine/noise.py."""
    a, b, _, _ = philox(*(torch.tensor(c & MASK) for c in (node, position, sample, 2, seed, seed >> 32)))
    return float((int(a) >> 5) * 2**26 + (int(b) >> 6)) * 2.0**-53


def recursive_verify(
    scores: Tensor,
    law: Tensor,
    law_row: Tensor,
    kind: Tensor,
    token: Tensor,
    parent: Tensor,
    start: Tensor,
    trees: Tensor,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
    max_nodes: int,
    max_depth: int,
    *,
    most_sampled: int = 1 << 30,
    lenience: float = 1.0,
    stream: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Recursive rejection (engine/recursion.py), tables as of `match_verify`; see kernels.reject."""
    found = []
    for r, tree in enumerate(trees.tolist()):
        part = slice(int(start[tree]), int(start[tree + 1]))
        own = _Tree(scores[part], law, law_row[part].tolist(), kind[part].tolist(), token[part].tolist(), parent[part].tolist())
        address = (int(seeds[r]), int(samples[r]), int(positions[r]))
        path, last = own.descend(partial(coin, *address), most_sampled, lenience)
        at = [torch.tensor([a], device=scores.device) for a in (*address[:2], address[2] + len(path), stream)]
        none = torch.zeros(1, dtype=torch.int64, device=scores.device)
        bonus = int(gumbel_argmax(last[None], none, none == 0, *at))
        emitted = [own.token[node] for node in path]
        found.append((path[:-1], emitted) if bonus == UNUSABLE else (path, [*emitted, bonus]))
    return padded(found, max_depth, scores.device)


@dataclass
class _Tree:
    scores: Tensor  # [n, V]
    law: Tensor
    law_row: list[int]
    kind: list[int]
    token: list[int]
    parent: list[int]

    def descend(self, coin: Callable[[int], float], most_sampled: int, lenience: float) -> tuple[list[int], Tensor]:
        """The accepted nodes, and the scores [V] that the token behind them is drawn from."""
        group = [0]  # nodes with the same path: the first stands
        while True:
            row = self.scores[group[0]].float()
            rest, rejected, sampled = torch.softmax(row, -1), False, 0
            judged = self.judged(group) if not rest.isnan().any() else []
            accepted = -1
            for child, own in judged:
                sampled += own is not None
                if own is not None and sampled > most_sampled:
                    continue
                one_hot = torch.zeros_like(rest).index_fill_(0, torch.tensor([self.token[child]], device=rest.device), 1.0)
                odds = one_hot if own is None else own
                if coin(child) * (lenience * float(odds[self.token[child]])) < float(rest[self.token[child]]):
                    accepted = child
                    break
                over = (rest - lenience * odds).clamp(min=0)
                rest, rejected = over / over.sum() if float(over.sum()) > 1e-12 else rest, True
            if accepted < 0:
                return self.path(group[0]), rest.log() if rejected else row
            twins = [c for c, _ in judged if c != accepted and self.token[c] == self.token[accepted]]
            group = [accepted, *twins]

    def path(self, node: int) -> list[int]:
        """From the root's child down to the node."""
        return [*self.path(self.parent[node]), node] if node > 0 else []

    def judged(self, group: list[int]) -> list[tuple[int, Tensor | None]]:
        """The children of a group in the order of their judgement, each with its law [V]; None: one-hot."""
        found: list[tuple[int, Tensor | None]] = []
        for node in group:
            q = None if self.law_row[node] < 0 else self.law[self.law_row[node]]
            left = q
            for child in (c for c, parent in enumerate(self.parent) if parent == node):
                how = self.kind[child]
                own = {0: None, 1: q, 2: left, 3: q}[how] if q is not None and left is not None else None
                if how == 3 and own is not None and float(own[self.token[child]]) <= 0:
                    own = None
                found.append((child, own))
                if how == 2 and left is not None:
                    rest = left.clone()
                    rest[self.token[child]] = 0
                    left = rest / rest.sum() if float(rest.sum()) > 1e-12 else None
        return found
