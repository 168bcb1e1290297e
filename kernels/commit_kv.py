"""Packs the accepted paths of a step's draft trees in the KV pool: all layers, one launch. Twin: kernels.reference.commit_kv.

A path's slots overlap the slots it moves to, so all is read before any is written: a program owns one lane of the pool (a layer,
a side, a head and a strip of its elements), holds that strip of all moved rows in registers, and writes behind a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels import reference

HELD = 16384  # elements in the registers of one program: 64 a thread
LEAST_STRIP = 8  # elements: 16 bytes of bf16


@triton.jit(do_not_specialize=["moved"], do_not_specialize_on_alignment=["source", "target"])
def _commit_kv(
    kv,  # [layers, N, 2, K, S, D]
    source,  # [M]
    target,  # [M]
    moved,
    kv_layer,
    kv_block,
    kv_side,
    kv_head,
    kv_slot,
    K: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    STRIP: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1)
    base = kv + layer * kv_layer + (lane // K) * kv_side + (lane % K) * kv_head
    row = tl.arange(0, ROWS)
    ids = tl.program_id(2) * STRIP + tl.arange(0, STRIP)
    held = (row < moved)[:, None] & (ids < D)[None, :]
    come = tl.load(source + row, mask=row < moved, other=0).to(tl.int64)
    go = tl.load(target + row, mask=row < moved, other=0).to(tl.int64)
    values = tl.load(base + ((come // S) * kv_block + (come % S) * kv_slot)[:, None] + ids[None, :], mask=held)
    tl.debug_barrier()  # a thread may write what another one reads
    tl.store(base + ((go // S) * kv_block + (go % S) * kv_slot)[:, None] + ids[None, :], values, mask=held)


def commit_kv(kv: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy slots source [M] to target [M] in every layer of kv [layers, N, 2, K, S, D]; reads all before it writes.

    kv: any type of 1, 2 or 4 bytes, any strides, the last dimension contiguous. source, target int32 or int64; no slot is twice
    in target. More than 2,048 moves do not fit into registers and go through the twin, which makes a copy of what moves.
    """
    layers, _, _, num_kv_heads, block_size, size = kv.shape
    if not len(source):
        return
    rows = max(triton.next_power_of_2(len(source)), 16)
    if rows * LEAST_STRIP > HELD:
        reference.commit_kv(kv, source.long(), target.long())
        return
    strip = min(triton.next_power_of_2(size), HELD // rows)
    _commit_kv[(layers, 2 * num_kv_heads, triton.cdiv(size, strip))](
        kv,
        source,
        target,
        len(source),
        *kv.stride()[:5],
        K=num_kv_heads,
        S=block_size,
        D=size,
        ROWS=rows,
        STRIP=strip,
        num_warps=8 if rows * strip > 4096 else 4,
    )
