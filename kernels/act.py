"""SiLU of the gate times the up projection in one launch. Twin: kernels.reference.silu_mul."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit
def _silu_mul(x, out, half, stride, TILE: tl.constexpr):  # x [T, 2 * I] -> out [T, I]
    row = tl.program_id(0).to(tl.int64)
    ids = tl.program_id(1) * TILE + tl.arange(0, TILE)
    held = ids < half
    gate = tl.load(x + row * stride + ids, mask=held, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + half + ids, mask=held, other=0.0).to(tl.float32)
    tl.store(out + row * half + ids, (gate / (1 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=held)


def silu_mul(x: Tensor) -> Tensor:
    """silu(x[:, :I]) * x[:, I:] for x [T, 2 * I], the gate's half first; in float32, rounded once to x's dtype.

    x: fp32, bf16 or fp16, rows of any stride. Returns a new [T, I].
    """
    rows, half = x.shape[0], x.shape[1] // 2
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, half, dtype=x.dtype, device=x.device)
    if rows:
        _silu_mul[(rows, triton.cdiv(half, TILE))](x, out, half, x.stride(0), TILE=TILE, num_warps=4)
    return out
