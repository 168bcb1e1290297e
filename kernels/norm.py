"""RMSNorm, alone and behind a residual add: one program per row, which it reads once and keeps in registers.

Zhang, Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467. A row's sum is always taken in the same order, so its
bits do not depend on how many rows there are. Twins: kernels.reference.rms_norm and add_rms_norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_COLUMNS = 65536  # of one row in registers: 64 values a thread at 1,024 threads


@triton.jit
def _rms_norm(
    x, weight, out, columns, x_stride, out_stride, eps, BLOCK: tl.constexpr
):  # x [T, C], weight [C] -> out [T, C], rows of any stride
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    held = ids < columns
    values = tl.load(x + row * x_stride + ids, mask=held, other=0.0).to(tl.float32)
    scale = tl.load(weight + ids, mask=held, other=0.0).to(tl.float32)
    normed = values / tl.sqrt(tl.sum(values * values, axis=0) / columns + eps) * scale
    tl.store(out + row * out_stride + ids, normed.to(out.dtype.element_ty), mask=held)


@triton.jit
def _add_rms_norm(
    x, residual, weight, out, total, columns, x_stride, residual_stride, eps, BLOCK: tl.constexpr
):  # x, residual [T, C], weight [C] -> out, total [T, C]: total is x + residual, rounded, and out its norm
    row = tl.program_id(0).to(tl.int64)
    ids = tl.arange(0, BLOCK)
    held = ids < columns
    values = tl.load(x + row * x_stride + ids, mask=held, other=0.0).to(tl.float32)
    values += tl.load(residual + row * residual_stride + ids, mask=held, other=0.0).to(tl.float32)
    stored = values.to(total.dtype.element_ty)
    tl.store(total + row * columns + ids, stored, mask=held)
    values = stored.to(tl.float32)  # the sum as the next layer will read it
    scale = tl.load(weight + ids, mask=held, other=0.0).to(tl.float32)
    normed = values / tl.sqrt(tl.sum(values * values, axis=0) / columns + eps) * scale
    tl.store(out + row * columns + ids, normed.to(out.dtype.element_ty), mask=held)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] / sqrt(mean(x^2) + eps) * weight [C], in float32, rounded once to x's dtype; contiguous.

    x: fp32, bf16 or fp16, its last dimension contiguous, rows of any stride. Raises ValueError for rows of more than 65,536.
    """
    columns = x.shape[-1]
    block, warps = _tile(columns)
    rows = x.reshape(-1, columns) if x.dim() != 2 else x
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        _rms_norm[(len(rows),)](rows, weight, out, columns, rows.stride(0), columns, eps, BLOCK=block, num_warps=warps)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum) of x, residual [T, C] of one dtype; the sum is rounded to it before it is normed.

    Last dimensions contiguous, rows of any stride; both results are new. Raises ValueError for rows of more than 65,536.
    """
    rows, columns = x.shape
    block, warps = _tile(columns)
    x = x if x.stride(-1) == 1 else x.contiguous()
    residual = residual if residual.stride(-1) == 1 else residual.contiguous()
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    if rows:
        strides = (x.stride(0), residual.stride(0))
        _add_rms_norm[(rows,)](x, residual, weight, out, total, columns, *strides, eps, BLOCK=block, num_warps=warps)
    return out, total


def _tile(columns: int) -> tuple[int, int]:
    """The power of two that holds a row, and the warps for it: eight values a thread, 16 bytes of bf16."""
    if columns > MOST_COLUMNS:
        raise ValueError(f"a row of {columns} does not fit into registers ({MOST_COLUMNS} at most)")
    block = triton.next_power_of_2(columns)
    return block, min(max(block // 256, 1), 32)
