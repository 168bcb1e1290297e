"""Stores the keys and values of a step's rows in the paged KV pool: one program per row. Twin: kernels.reference.write_kv."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _write_kv(
    kv,  # [N, 2, K, S, D]
    new,  # [T, 2, K, D]
    slots,  # [T]
    kv_scale,  # [2, K] or anything where not SCALED
    kv_block,
    kv_side,
    kv_head,
    kv_slot,
    new_row,
    new_side,
    new_head,
    MOST: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    lane = tl.arange(0, HEADS)
    side, head = lane // K, lane % K
    ids = tl.arange(0, BLOCK)
    held = (lane < 2 * K)[:, None] & (ids < D)[None, :]
    values = tl.load(new + row * new_row + (side * new_side + head * new_head)[:, None] + ids[None, :], mask=held, other=0.0)
    if SCALED:
        scale = tl.load(kv_scale + lane, mask=lane < 2 * K, other=1.0)
        values = tl.minimum(tl.maximum(values.to(tl.float32) / scale[:, None], -MOST), MOST)
    place = kv + (slot // S) * kv_block + (slot % S) * kv_slot  # int64: a pool may hold more than 2^31 elements
    tl.store(place + (side * kv_side + head * kv_head)[:, None] + ids[None, :], values.to(kv.dtype.element_ty), mask=held)


def write_kv(kv: Tensor, new: Tensor, slots: Tensor, kv_scale: Tensor | None = None) -> None:
    """Store new [T, 2, K, D] (keys and values of the fed rows) at slots [T] of kv [N, 2, K, S, D]; a negative slot: nowhere.

    kv: fp32, bf16, fp16 or float8_e4m3fn; new: fp32, bf16 or fp16, cast to kv's type. Any strides, the last dimension contiguous;
    slots int32 or int64, all different. kv_scale [2, K] float32, contiguous, where kv is float8: new / kv_scale is stored.
    """
    _, _, num_kv_heads, block_size, size = kv.shape
    if not len(slots):
        return
    new = new if new.stride(3) == 1 else new.contiguous()
    _write_kv[(len(slots),)](
        kv,
        new,
        slots,
        slots if kv_scale is None else kv_scale,
        *kv.stride()[:4],
        *new.stride()[:3],
        MOST=torch.finfo(kv.dtype).max,
        K=num_kv_heads,
        S=block_size,
        D=size,
        HEADS=triton.next_power_of_2(2 * num_kv_heads),
        BLOCK=triton.next_power_of_2(size),
        SCALED=kv_scale is not None,
        num_warps=4,
    )
