"""A step's rules in a few launches: what a GPU does where the CPU walks row by row (kernels/verify.py, kernels/truncate.py).

The same tokens and the same sets as engine/walk.py and engine/truncation.py give. One transfer takes a forest there, one brings
the verdict back. Where there is no GPU, or no Triton, `has_kernels` says so and the callers go on as ever.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from engine.request import SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict


def has_kernels(device: torch.device) -> bool:
    return device.type == "cuda" and find_spec("triton") is not None


def match_verdict(forest: DraftForest, scores: Tensor, seqs: Seq[Sequence]) -> Verdict:
    """The match rule's verdict on every tree; scores [M, V] in node order. It waits for the device once."""
    from kernels.verify import match_verify

    if not forest.num_trees:
        return Verdict([], [])
    tree = np.repeat(np.arange(forest.num_trees), np.diff(forest.start))
    rows, max_depth = len(tree), int(forest.depth.max())
    seeds = np.array([seq.params.seed for seq in seqs], dtype=np.uint64)[tree]
    samples, positions, noisy = (
        np.array(column, dtype=np.int32)[tree]
        for column in zip(*((seq.sample_index, seq.num_output, not seq.params.greedy) for seq in seqs), strict=True)
    )
    columns = [seeds.view(np.int32), samples, positions + forest.depth, forest.token, forest.parent, noisy, forest.start]
    sizes = [2 * rows, *[rows] * 5, forest.num_trees + 1]
    there = torch.from_numpy(np.concatenate(columns, dtype=np.int32, casting="unsafe")).to(scores.device, non_blocking=True)
    seed, sample, position, token, parent, perturbed, start = there.split(sizes)
    scores = scores if scores.stride(-1) == 1 else scores.contiguous()
    addresses = (perturbed.bool(), seed.view(torch.int64), sample, position)
    nodes, tokens, counts = match_verify(scores, *addresses, token, parent, start, int(np.diff(forest.start).max()), max_depth)
    table = torch.cat((counts[:, None], nodes, tokens), 1).tolist()
    found = Verdict([], [])
    for count, *rest in table:
        found.nodes.append(rest[: max(count - 1, 0)])
        found.tokens.append(rest[max_depth : max_depth + count])
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
