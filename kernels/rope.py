"""Rotary embedding, alone and fused with what stands around it in a layer: QK norm before, the cache write behind.

RoFormer (arXiv 2104.09864), rotate-half; the QK norm is Qwen3's (arXiv 2505.09388). A program rotates a few heads of one row, as
two halves that are loaded apart, so that nothing has to be shuffled between threads. Twins: kernels.reference.rope_ and
rope_write_kv_.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

HEADS = 4  # of one row, in one program


@triton.jit
def _rope(
    qk, cos, sin, heads, row_stride, head_stride, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr
):  # qk [T, heads, 2 * HALF] in place; cos, sin [T, 2 * HALF]
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    ids = tl.arange(0, BLOCK)
    inside = ids < HALF
    held = (head < heads)[:, None] & inside[None, :]
    low = qk + row * row_stride + head[:, None] * head_stride + ids[None, :]
    table = row * 2 * HALF + ids
    a = tl.load(low, mask=held, other=0.0).to(tl.float32)
    b = tl.load(low + HALF, mask=held, other=0.0).to(tl.float32)
    cos_a = tl.load(cos + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(low, (a * cos_a + b * sin_a).to(qk.dtype.element_ty), mask=held)
    tl.store(low + HALF, (b * cos_b + a * sin_b).to(qk.dtype.element_ty), mask=held)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rope_write_kv(
    qkv,  # [T, (H + 2 * K) * 2 * HALF]: query heads (rotated in place), key heads, value heads
    cos,  # [P, 2 * HALF]
    sin,
    positions,  # [T]
    kv,  # [N, 2, K, S, 2 * HALF]
    slots,  # [T]; negative: the row is not stored
    q_weight,  # [2 * HALF] or anything where not NORM
    k_weight,
    eps,
    num_heads,
    num_kv_heads,
    block_size,
    row_stride,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    ids = tl.arange(0, BLOCK)
    inside = ids < HALF
    held = (head < num_heads + 2 * num_kv_heads)[:, None] & inside[None, :]
    low = qkv + row * row_stride + head[:, None] * 2 * HALF + ids[None, :]
    a = tl.load(low, mask=held, other=0.0)
    b = tl.load(low + HALF, mask=held, other=0.0)
    is_query = (head < num_heads)[:, None]
    is_value = (head >= num_heads + num_kv_heads)[:, None]
    x, y = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        norm = tl.sqrt(tl.sum(x * x + y * y, axis=1) / (2 * HALF) + eps)[:, None]
        of_query = is_query & inside[None, :]
        of_key = inside[None, :] & (is_query == 0)
        weight_x = tl.load(q_weight + ids[None, :], mask=of_query, other=0.0).to(tl.float32)
        weight_x += tl.load(k_weight + ids[None, :], mask=of_key, other=0.0).to(tl.float32)
        weight_y = tl.load(q_weight + HALF + ids[None, :], mask=of_query, other=0.0).to(tl.float32)
        weight_y += tl.load(k_weight + HALF + ids[None, :], mask=of_key, other=0.0).to(tl.float32)
        x = (x / norm * weight_x).to(qkv.dtype.element_ty).to(tl.float32)  # as a norm of its own would have left it
        y = (y / norm * weight_y).to(qkv.dtype.element_ty).to(tl.float32)
    table = tl.load(positions + row).to(tl.int64) * 2 * HALF + ids
    cos_a = tl.load(cos + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin + table, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin + table + HALF, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.where(is_value, a, (x * cos_a + y * sin_a).to(qkv.dtype.element_ty))
    second = tl.where(is_value, b, (y * cos_b + x * sin_b).to(qkv.dtype.element_ty))
    tl.store(low, first, mask=held & is_query)
    tl.store(low + HALF, second, mask=held & is_query)
    slot = tl.load(slots + row).to(tl.int64)
    if slot >= 0:
        # Keys and values lie one behind the other in a block: a row's 2 * K heads are 2 * K pieces, S * D apart.
        piece = (slot // block_size) * 2 * num_kv_heads + (head - num_heads)
        place = kv + (piece * block_size + slot % block_size)[:, None] * 2 * HALF + ids[None, :]
        stored = held & (is_query == 0)
        tl.store(place, first.to(kv.dtype.element_ty), mask=stored)
        tl.store(place + HALF, second.to(kv.dtype.element_ty), mask=stored)


def rope_(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate qk [T, heads, D] in place. cos, sin [T, 1, D], contiguous; sin's first half carries the minus of rotate-half.

    qk: fp32, bf16 or fp16, its last dimension contiguous. Computed in float32, rounded once.
    """
    rows, heads, size = qk.shape
    if rows and heads:
        tile = {"HALF": size // 2, "BLOCK": triton.next_power_of_2(size // 2), "HEADS": HEADS}
        _rope[(rows, triton.cdiv(heads, HEADS))](qk, cos, sin, heads, qk.stride(0), qk.stride(1), **tile, num_warps=1)
    return qk


def rope_write_kv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv: Tensor,
    slots: Tensor,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """What a layer does between its QKV product and its attention, one launch: QK norm, rotation, cache write.

    qkv [T, (H + 2 K) * D], rows of any stride: H query heads, K key heads, K value heads. cos, sin [P, 1, D]: the tables of all
    positions; positions [T]. kv [N, 2, K, S, D] of one layer, contiguous; slots [T], negative where a row is not to be stored.
    q_weight, k_weight [D]: of the QK norm, both or none. Returns the rotated queries [T, H, D], a view of qkv (in place).
    """
    rows = len(qkv)
    num_kv_heads, block_size, size = kv.shape[2:]
    if rows:
        norm = q_weight is not None
        tile = {"NORM": norm, "HALF": size // 2, "BLOCK": triton.next_power_of_2(size // 2), "HEADS": HEADS}
        weights = (q_weight, k_weight) if norm else (qkv, qkv)
        counts = (num_heads, num_kv_heads, block_size, qkv.stride(0))
        grid = (rows, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS))
        _rope_write_kv[grid](qkv, cos, sin, positions, kv, slots, *weights, eps, *counts, **tile, num_warps=1)
    return qkv[:, : num_heads * size].unflatten(1, (num_heads, size))
