"""Copies whole KV blocks in every layer, one launch. Twin: kernels.reference.copy_blocks."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements: 16 a thread at 8 warps


@triton.jit(do_not_specialize_on_alignment=["source", "target"])
def _copy_blocks(kv, source, target, kv_layer, kv_block, SIZE: tl.constexpr, TILE: tl.constexpr):  # blocks of SIZE elements
    move = tl.program_id(0)
    layer = kv + tl.program_id(1).to(tl.int64) * kv_layer
    ids = tl.program_id(2) * TILE + tl.arange(0, TILE)
    come = tl.load(source + move).to(tl.int64) * kv_block
    go = tl.load(target + move).to(tl.int64) * kv_block
    tl.store(layer + go + ids, tl.load(layer + come + ids, mask=ids < SIZE), mask=ids < SIZE)


def copy_blocks(kv: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy blocks source [M] to target [M] in every layer of kv [layers, N, 2, K, S, D]; no block may be in both.

    kv: any type of 1, 2 or 4 bytes, a block contiguous. source, target int32 or int64; no block is twice in target.
    Raises ValueError for a kv whose blocks are not contiguous.
    """
    if not kv[0, 0].is_contiguous():
        raise ValueError("the blocks of a KV pool lie in one piece each")
    size = kv[0, 0].numel()
    if len(source):
        grid = (len(source), len(kv), triton.cdiv(size, TILE))
        _copy_blocks[grid](kv, source, target, kv.stride(0), kv.stride(1), SIZE=size, TILE=TILE, num_warps=8)
