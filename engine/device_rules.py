"""A step's rules in a few launches, where the CPU walks row by row: kernels/sample.py, verify.py, reject.py and truncate.py.

The same tokens and the same sets as engine/gumbel_max.py, walk.py, recursion.py and truncation.py give (recursion: up to the
rounding of a law). Where there is no GPU, or no Triton, `has_kernels` says so and the callers go on as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.protocols import Siblings
from engine.request import SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict


def has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None


def warm_up(vocab_size: int, device: torch.device, max_nodes: int) -> None:
    """Compile whatever the rules of any step may need, for trees of up to so many nodes, roots included; nothing else is compiled
    later. Seconds the first time, then from Triton's cache."""
    from kernels.reject import recursive_verify
    from kernels.truncate import truncate_
    from kernels.verify import match_verify

    scores = torch.zeros(2, vocab_size, device=device)
    column, start, one = (torch.tensor(ids, dtype=torch.int32, device=device) for ids in ([0, 0], [0, 1, 2], [1, 1]))
    seeds, parent, share = column.long(), column - 1, torch.full((2,), 0.5, dtype=torch.float64, device=device)
    truncate_(scores.clone(), one, share, share)
    for size in (1 << bits for bits in range(max(max_nodes, 2).bit_length() + 1)):
        address = (seeds, column, column)
        match_verify(scores, one.bool(), *address, column, parent, start, size, 1)
        recursive_verify(scores, scores, column, one.to(torch.int8), column, parent, start, column, *address, size, 1)


def draw(scores: Tensor, rows: Seq[int], addresses: Seq[tuple[int, int, int, int]]) -> list[int]:
    """engine.gumbel_max.gumbel_argmax: one token per address (seed, sample, position, stream), -1 for an unusable row."""
    from kernels.sample import gumbel_argmax

    seeds, *rest = zip(*addresses, strict=True)
    columns = [np.array(seeds, dtype=np.uint64).view(np.int32), rows, *rest]
    seed, row, sample, position, stream = _sent(columns, scores.device)
    tokens = gumbel_argmax(_usable(scores), row, row >= 0, seed.view(torch.int64), sample, position, stream)
    return [int(token) for token in tokens.tolist()]


def match_verdict(forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
    """The match rule's verdict on every tree; scores [M, V] in node order. It waits for the device once."""
    from kernels.verify import match_verify

    if not forest.num_trees:
        return Verdict([], [])
    tree = np.repeat(np.arange(forest.num_trees), np.diff(forest.start))
    seeds, samples, positions = _addresses(seqs)
    noisy = np.array([not seq.params.greedy for seq in seqs])
    columns = [seeds[tree].view(np.int32), samples[tree], positions[tree] + forest.depth, noisy[tree]]
    columns += [forest.token, forest.parent, forest.start]
    seed, sample, position, perturbed, token, parent, start = _sent(columns, scores.device)
    size, depth = int(np.diff(forest.start).max()), int(forest.depth.max())
    address = (perturbed.bool(), seed.view(torch.int64), sample, position)
    return _read(match_verify(_usable(scores), *address, token, parent, start, size, depth))


def recursive_verdict(
    forest: DraftForest, scores: Tensor, seqs: Seq[Sequence], kinds: Mapping[str, Siblings], most_sampled: int = 1 << 30
) -> Verdict:
    """Recursive rejection (engine/recursion.py) of the trees with sampled nodes of requests that are not greedy; the match rule's
    verdict on the others. It waits for the device once for each of the two."""
    from kernels.reject import recursive_verify

    ruled = [b for b, seq in enumerate(seqs) if not seq.params.greedy and forest.is_sampled(b)]
    matched = sorted(set(range(forest.num_trees)) - set(ruled))
    found: dict[int, tuple[list[int], list[int]]] = {}
    if matched:
        rows = [row for b in matched for row in range(int(forest.start[b]), int(forest.start[b + 1]))]
        part = match_verdict(forest.select(matched), scores[rows], [seqs[b] for b in matched])
        found.update(zip(matched, zip(part.nodes, part.tokens, strict=True), strict=True))
    if ruled and forest.law is not None and forest.law_row is not None:
        seeds, samples, positions = _addresses([seqs[b] for b in ruled])
        columns = [seeds.view(np.int32), ruled, samples, positions]
        columns += [forest.law_row, how_chosen(forest, kinds), forest.token, forest.parent, forest.start]
        seed, trees, sample, position, law_row, kind, token, parent, start = _sent(columns, scores.device)
        law = _usable(forest.law.to(scores.device, torch.float32))
        size, depth = int(np.diff(forest.start).max()), int(forest.depth.max())
        sampled = (_usable(scores), law, law_row, kind.to(torch.int8), token, parent, start)
        address = (trees, seed.view(torch.int64), sample, position)
        part = _read(recursive_verify(*sampled, *address, size, depth, most_sampled=most_sampled))
        found.update(zip(ruled, zip(part.nodes, part.tokens, strict=True), strict=True))
    return Verdict([found[b][0] for b in range(forest.num_trees)], [found[b][1] for b in range(forest.num_trees)])


def how_chosen(forest: DraftForest, kinds: Mapping[str, Siblings]) -> Seq[int]:
    """For each node what kernels/reject.py calls its kind. Raises KeyError for a sampled node of an unknown drafter."""
    numbers = {Siblings.IID: 1, Siblings.DISTINCT: 2, Siblings.GREEDY: 3}
    owner = np.repeat(np.arange(forest.num_trees), np.diff(forest.start))
    names = forest.node_drafter or [forest.drafter[b] if forest.drafter else "" for b in owner]
    law_row = np.full(forest.num_nodes, -1) if forest.law_row is None else forest.law_row
    sampled = (forest.parent >= 0) & (law_row[forest.start[owner] + np.maximum(forest.parent, 0)] >= 0)
    return [numbers.get(kinds[name], 0) if drawn else 0 for name, drawn in zip(names, sampled.tolist(), strict=True)]


def _addresses(seqs: Seq[Sequence]) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32]]:
    """Seeds, samples and positions of the roots [B]."""
    samples, positions = (np.array([getattr(seq, name) for seq in seqs], np.int32) for name in ("sample_index", "num_output"))
    return np.array([seq.params.seed for seq in seqs], dtype=np.uint64), samples, positions


def _sent(columns: Seq[Any], device: torch.device) -> Seq[Tensor]:
    """Columns of integers on the device, as int32, by one transfer. Each begins at 16 bytes: Triton compiles a kernel anew for
    addresses that do not."""
    places = np.cumsum([0] + [len(column) + 3 & -4 for column in columns])
    packed = np.zeros(int(places[-1]), dtype=np.int32)
    for first, column in zip(places.tolist(), columns, strict=False):
        packed[first : first + len(column)] = np.asarray(column).astype(np.int64).astype(np.int32)  # a stream may take 32 bits
    there = torch.from_numpy(packed).to(device, non_blocking=True)
    return [there[first : first + len(column)] for first, column in zip(places.tolist(), columns, strict=False)]


def _usable(scores: Tensor) -> Tensor:
    return scores if scores.stride(-1) == 1 else scores.contiguous()


def _read(tables: tuple[Tensor, Tensor, Tensor]) -> Verdict:
    """The kernels' tables as a verdict: here the host waits."""
    nodes, tokens, counts = tables
    depth = nodes.shape[1]
    found = Verdict([], [])
    for count, *rest in torch.cat((counts[:, None], nodes, tokens), 1).tolist():
        found.nodes.append(rest[: max(count - 1, 0)])
        found.tokens.append(rest[depth : depth + count])
    return found


def truncate_rows(scores: Tensor, params: Seq[SamplingParams], rows: Seq[int]) -> None:
    """top_k, top_p and min_p of a whole step, in place: float32 scores [M, V] hold rows[i] rows of params[i], one by one.

    Greedy requests keep everything.
    """
    from kernels.truncate import truncate_

    asked = [(0, 1.0, 0.0) if p.greedy else (p.top_k, p.top_p, p.min_p) for p in params]
    if all(a == (0, 1.0, 0.0) for a in asked):
        return
    table = torch.from_numpy(np.repeat(np.array(asked, dtype=np.float64), rows, axis=0)).to(scores.device, non_blocking=True)
    top_k, top_p, min_p = table.t().contiguous()
    use_k, use_p = any(k > 0 for k, _, _ in asked), any(p < 1 for _, p, _ in asked)
    truncate_(scores, top_k.int(), top_p, min_p, use_k=use_k, use_p=use_p)
