"""The match rule over a whole batch of draft trees, in three launches: draw behind every node, then walk every tree.

At each node the target's own token is drawn; a child that carries it is descended to, else it is the bonus. Noise is addressed,
so the tokens behind nodes that the walk never reaches cost work and change nothing. Nothing waits for the device: what comes
back is a table that the host reads when it wants to. Twin: kernels.reference_sampling.match_verify.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sample import gumbel_argmax


@triton.jit(do_not_specialize=["depth"])
def _walk(drawn, token, parent, start, nodes, tokens, counts, depth, NODES: tl.constexpr):
    tree = tl.program_id(0)
    first = tl.load(start + tree)
    ids = tl.arange(0, NODES)
    held = ids < tl.load(start + tree + 1) - first
    carried = tl.load(token + first + ids, mask=held, other=-1)
    above = tl.load(parent + first + ids, mask=held, other=-2)
    node = tl.zeros([], tl.int32)
    count = tl.zeros([], tl.int32)
    going = tl.full([], 1, tl.int32)
    for d in range(depth + 1):
        drawn_here = tl.load(drawn + first + node)
        emits = (going != 0) & (drawn_here >= 0)
        # A node stands once the row behind it is usable: plain decoding would have emitted everything before an unusable row.
        tl.store(nodes + tree * depth + d - 1, tl.where(emits, node, -1), mask=d > 0)
        tl.store(tokens + tree * (depth + 1) + d, tl.where(emits, drawn_here, -1))
        count += emits.to(tl.int32)
        child = tl.min(tl.where((above == node) & (carried == drawn_here), ids, NODES), axis=0)
        going = (emits & (child < NODES)).to(tl.int32)
        node = tl.where(going != 0, child, node)
    tl.store(counts + tree, count)


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
    """(nodes [B, max_depth], tokens [B, max_depth + 1], counts [B]), all int32: the accepted nodes of every tree (indices inside
    it), its tokens with the bonus last, both padded with -1, and how many tokens there are. There is one node fewer; a tree whose
    root's row is unusable (NaN, infinity, or nothing allowed) has none of either, and a path stops before an unusable row.

    Per node, in node order: scores [M, V] as gumbel_argmax takes them, noisy [M] bool (False: greedy), seeds [M] int64, samples,
    positions (of the token behind the node: the root's plus the node's depth), token, parent (-1: root) [M] int32; start [B + 1]
    int32. max_nodes, max_depth: of the largest and the deepest tree, roots counted as one node and no depth.
    """
    trees = len(start) - 1
    rows = torch.arange(len(scores), dtype=torch.int32, device=scores.device)
    drawn = gumbel_argmax(scores, rows, noisy, seeds, samples, positions, torch.zeros_like(rows))
    nodes, tokens, counts = tables(trees, max_depth, scores.device)
    if trees:
        args = (drawn, token, parent, start, nodes, tokens, counts, max_depth)
        _walk[(trees,)](*args, NODES=max(16, triton.next_power_of_2(max_nodes)), num_warps=1)
    return nodes, tokens, counts


def tables(trees: int, max_depth: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What a verdict is written to: nodes [B, max_depth], tokens [B, max_depth + 1], counts [B]."""
    nodes = torch.empty(trees, max_depth, dtype=torch.int32, device=device)
    tokens = torch.empty(trees, max_depth + 1, dtype=torch.int32, device=device)
    return nodes, tokens, torch.empty(trees, dtype=torch.int32, device=device)
