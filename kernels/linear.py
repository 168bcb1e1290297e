"""A linear layer in one fixed order of sums: a row's bits are the same alone and in any batch. Twin: kernels.reference.linear.

What deterministic mode needs where a library's matrix product takes another kernel for another number of rows. There is one
tile, hence one compiled kernel, for 1 row and for 512; where there are few outputs the inputs are split over programs, by the
weight's shape and the device alone, and the parts are added in order. Outputs lie on the tile's first side, and rows that are
not there are not read: up to 64 rows the time is meant to be that of reading the weight. Not measured on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.sample import multiprocessors

OUTPUTS, ROWS, INPUTS = 64, 64, 64  # of a tile
LEAST_PART = 8 * INPUTS  # a part of fewer inputs costs more than it spares
ADDED = 1024  # results of one program that adds parts


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,  # [T, K], rows of any stride
    weight,  # [N, K], rows of any stride
    bias,  # [N], or anything where not BIAS
    out,  # [splits, T, N]: float32, or the result where there is one part
    rows,
    outputs,
    inputs,
    x_stride,
    weight_stride,
    part,  # inputs in a part, a multiple of BK
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,  # the interpreter multiplies no bf16 matrices
    EVEN: tl.constexpr,  # inputs fill whole tiles
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)  # the tiles of one weight lie side by side in time: it is read from memory once
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.program_id(2)
    begin = split * part
    k = tl.arange(0, BK)
    own = weight + n.to(tl.int64)[:, None] * weight_stride + k[None, :]
    fed = x + t.to(tl.int64)[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BN, BT], tl.float32)
    for first in range(begin, tl.minimum(begin + part, inputs), BK):
        if EVEN:
            w = tl.load(own + first, mask=(n < outputs)[:, None], other=0.0)
            v = tl.load(fed + first, mask=(t < rows)[None, :], other=0.0)
        else:
            held = first + k < inputs
            w = tl.load(own + first, mask=(n < outputs)[:, None] & held[None, :], other=0.0)
            v = tl.load(fed + first, mask=(t < rows)[None, :] & held[:, None], other=0.0)
        if WIDE:
            acc = tl.dot(w.to(tl.float32), v.to(tl.float32), acc, input_precision="ieee")
        else:
            acc = tl.dot(w, v, acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias + n, mask=n < outputs, other=0.0).to(tl.float32)[:, None]
    target = out + (split * rows + t).to(tl.int64)[:, None] * outputs + n[None, :]
    tl.store(target, tl.trans(acc).to(out.dtype.element_ty), mask=(t < rows)[:, None] & (n < outputs)[None, :])


@triton.jit(do_not_specialize=["size"])
def _add_parts(parts, bias, out, size, outputs, splits, BIAS: tl.constexpr, TILE: tl.constexpr):
    """parts [splits, T * N] -> out [T * N], added in order."""
    ids = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    held = ids < size
    total = tl.zeros([TILE], tl.float32)
    for split in range(splits):
        total += tl.load(parts + tl.cast(split, tl.int64) * size + ids, mask=held, other=0.0)
    if BIAS:
        total += tl.load(bias + ids % outputs, mask=held, other=0.0).to(tl.float32)
    tl.store(out + ids, total.to(out.dtype.element_ty), mask=held)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, splits: int = 0) -> Tensor:
    """x [T, K] times the weight [N, K] transposed, plus bias [N]: [T, N] in x's type, summed in float32 and rounded once.

    All of one type (bf16, fp16 or fp32: then without tensor cores), last dimensions contiguous, rows of any stride. splits: parts
    of the inputs, 0 for as many as fill the device (a function of the weight's shape). Raises ValueError for what does not fit.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    if weight.shape[1] != inputs or weight.dtype != x.dtype:
        raise ValueError(f"{x.dtype} rows of {inputs} do not fit a {weight.dtype} weight of {tuple(weight.shape)}")
    x = x if x.stride(1) == 1 else x.contiguous()
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    part, splits = _parts(outputs, inputs, splits, x.device)
    parts = out if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    added = out if bias is None else bias
    _linear[(triton.cdiv(rows, ROWS), triton.cdiv(outputs, OUTPUTS), splits)](
        *(x, weight, added, parts, rows, outputs, inputs, x.stride(0), weight.stride(0), part),
        BIAS=bias is not None and splits == 1,
        WIDE=not x.is_cuda,
        EVEN=inputs % INPUTS == 0,
        BN=OUTPUTS,
        BT=ROWS,
        BK=INPUTS if x.dtype != torch.float32 else INPUTS // 2,
        num_warps=4,
        num_stages=4,
    )
    if splits > 1:
        size = rows * outputs
        tiles = (triton.cdiv(size, ADDED),)
        _add_parts[tiles](parts, added, out, size, outputs, splits, BIAS=bias is not None, TILE=ADDED)
    return out


def _parts(outputs: int, inputs: int, splits: int, device: torch.device) -> tuple[int, int]:
    """Inputs of a part, whole tiles, and how many parts there are: two programs a multiprocessor, where the inputs allow it."""
    filling = triton.cdiv(2 * multiprocessors(device), triton.cdiv(outputs, OUTPUTS))
    wanted = splits or min(filling, max(1, inputs // LEAST_PART))
    part = triton.cdiv(triton.cdiv(inputs, INPUTS), wanted) * INPUTS
    return part, triton.cdiv(inputs, part)
