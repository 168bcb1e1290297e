"""Parents of draft-tree nodes -> depths and ancestor words, for a whole forest in one launch. Twin: kernels.reference.tree_mask.

Every node walks up to its root, 32 of them in one program: the parents of a tree fill a few cache lines.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NODES = 32  # of one tree, in one program


@triton.jit(do_not_specialize_on_alignment=["parent", "start"])
def _tree_mask(parent, start, depth, words, num_words, NODES: tl.constexpr, WORDS: tl.constexpr):
    first = tl.load(start + tl.program_id(0))
    count = tl.load(start + tl.program_id(0) + 1) - first
    node = tl.program_id(1) * NODES + tl.arange(0, NODES)
    word = tl.arange(0, WORDS)
    held = node < count
    at = tl.where(held, node, -1)
    level = tl.full((NODES,), -1, tl.int32)
    seen = tl.zeros((NODES, WORDS), tl.int32)
    while tl.max(at, axis=0) >= 0:
        bit = tl.full((NODES,), 1, tl.int32) << (at & 31)
        seen = seen | tl.where((at >= 0)[:, None] & ((at >> 5)[:, None] == word[None, :]), bit[:, None], 0)
        level += (at >= 0).to(tl.int32)
        at = tl.load(parent + first + at, mask=at >= 0, other=-1)
    tl.store(depth + first + node, level, mask=held)
    place = words + (first + node).to(tl.int64)[:, None] * num_words + word[None, :]
    tl.store(place, seen, mask=held[:, None] & (word < num_words)[None, :])


def tree_mask(parent: Tensor, start: Tensor, num_words: int) -> tuple[Tensor, Tensor]:
    """Depth [N] and ancestors (itself among them) as words [N, num_words] of every tree node, int32 both.

    parent [N] int32: index inside the own tree, -1 for a root; tree b owns nodes start[b] : start[b + 1] (int32 [B + 1]), parents
    before children, at most 32 * num_words of them. Both contiguous.
    """
    depth = torch.empty(len(parent), dtype=torch.int32, device=parent.device)
    words = torch.empty(len(parent), num_words, dtype=torch.int32, device=parent.device)
    if len(parent):
        grid = (len(start) - 1, triton.cdiv(32 * num_words, NODES))
        tile = {"NODES": NODES, "WORDS": triton.next_power_of_2(num_words)}
        _tree_mask[grid](parent, start, depth, words, num_words, **tile, num_warps=1)
    return depth, words
