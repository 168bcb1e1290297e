"""A linear layer over a weight of four or eight bits: unpacked in registers, multiplied in the activations' own type.

Made for few rows (1 to 64, what decoding and verification feed), where the time is that of reading the weight. Each number
becomes exactly the value that `QuantWeight.dequantize` gives, so the layer is the dequantized one but for the order of a sum.
That order depends on the weight's shape alone: inputs are split over programs where there are few outputs, and the parts are
added in order.
Twin: kernels.reference_quant.linear.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quant_weight import QuantWeight
from kernels.sample import multiprocessors

OUTPUTS, INPUTS = 64, 128  # of a tile
LEAST_ROWS, MOST_ROWS = 16, 64  # likewise: a power of two between them


@triton.jit
def _spread(values, RUNS: tl.constexpr, EACH: tl.constexpr):
    """[N, RUNS] -> [N, RUNS * EACH], every column EACH times."""
    rows: tl.constexpr = values.shape[0]
    return tl.reshape(tl.broadcast_to(values[:, :, None], [rows, RUNS, EACH]), [rows, RUNS * EACH])


@triton.jit
def _times(weight, x, acc, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """acc + weight [N, K] times x [T, K] transposed; the weight is rounded to DTYPE first."""
    w = weight.to(DTYPE)
    if WIDE:
        return tl.dot(w.to(tl.float32), tl.trans(x.to(tl.float32)), acc, input_precision="ieee")
    else:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x,  # [T, K], rows of any stride
    packed,  # [N, K / 2] uint8, or [N, K] int8 or float8
    scales,  # [N, K / group]
    offsets,  # the same, or anything where not OFFSET
    bias,  # [N], or anything where not BIAS
    out,  # [splits, T, N]: float32, or the result where there is one part
    rows,
    outputs,
    inputs,
    stride,
    packed_stride,  # bytes of a row
    group,
    zero,
    part,  # inputs in a part, a multiple of BK
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    BIAS: tl.constexpr,
    WIDE: tl.constexpr,  # the interpreter multiplies no bf16 matrices
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    split = tl.program_id(2)
    row = x + t.to(tl.int64)[:, None] * stride
    groups = inputs // group
    acc = tl.zeros([BN, BT], tl.float32)
    runs: tl.constexpr = BK // 32
    for first in range(split * part, tl.minimum(split * part + part, inputs), BK):
        run = first + tl.arange(0, runs) * 32
        known = (n < outputs)[:, None] & (run < inputs)[None, :]
        at = n.to(tl.int64)[:, None] * groups + (run // group)[None, :]
        scale = tl.load(scales + at, mask=known, other=0.0).to(tl.float32)
        if BITS == 4:
            i = tl.arange(0, BK // 2)
            k = first + (i // 16) * 32 + i % 16  # of the low half; 16 further on of the high one
            held = (n < outputs)[:, None] & (k < inputs)[None, :]
            place = packed + n.to(tl.int64)[:, None] * packed_stride + (first // 2 + i)[None, :]
            q = tl.load(place, mask=held, other=0)
            scale = _spread(scale, runs, 16)
            low = ((q & 15).to(tl.float32) - zero) * scale
            high = ((q >> 4).to(tl.float32) - zero) * scale
            if OFFSET:
                offset = _spread(tl.load(offsets + at, mask=known, other=0.0).to(tl.float32), runs, 16)
                low += offset
                high += offset
            there = (t < rows)[:, None] & (k < inputs)[None, :]
            acc = _times(low, tl.load(row + k[None, :], mask=there, other=0.0), acc, x.dtype.element_ty, WIDE)
            acc = _times(high, tl.load(row + k[None, :] + 16, mask=there, other=0.0), acc, x.dtype.element_ty, WIDE)
        else:
            k = first + tl.arange(0, BK)
            held = (n < outputs)[:, None] & (k < inputs)[None, :]
            q = tl.load(packed + n.to(tl.int64)[:, None] * packed_stride + k[None, :], mask=held, other=0.0)
            value = (q.to(tl.float32) - zero) * _spread(scale, runs, 32)
            if OFFSET:
                value += _spread(tl.load(offsets + at, mask=known, other=0.0).to(tl.float32), runs, 32)
            there = (t < rows)[:, None] & (k < inputs)[None, :]
            acc = _times(value, tl.load(row + k[None, :], mask=there, other=0.0), acc, x.dtype.element_ty, WIDE)
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


def linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None, splits: int = 0, fixed: bool = False) -> Tensor:
    """x [T, K] times the weight [N, K] transposed, plus bias [N]: [T, N] in x's type, summed in float32.

    x: bf16, fp16 or fp32, last dimension contiguous, rows of any stride; the weight on x's device. splits: parts of the inputs,
    0 for as many as fill the device (a function of the weight's shape). fixed: one tile for any number of rows, hence one
    compiled kernel and one order of sums, as in kernels/linear.py; without it few rows take a smaller one.
    """
    rows, inputs = x.shape
    x = x if x.stride(1) == 1 else x.contiguous()
    outputs = weight.out_features
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    tiles = triton.cdiv(outputs, OUTPUTS)
    most = max(1, inputs // (4 * INPUTS))  # a part of fewer inputs costs more than it spares
    splits = splits or min(most, triton.cdiv(2 * multiprocessors(x.device), tiles))
    part = triton.cdiv(triton.cdiv(inputs, INPUTS), splits) * INPUTS
    splits = triton.cdiv(inputs, part)
    parts = out if splits == 1 else torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
    block = MOST_ROWS if fixed else min(max(LEAST_ROWS, triton.next_power_of_2(rows)), MOST_ROWS)
    offsets = weight.scales if weight.offsets is None else weight.offsets
    _linear[(tiles, triton.cdiv(rows, block), splits)](
        *(x, weight.packed, weight.scales, offsets, out if bias is None else bias, parts),
        *(rows, outputs, inputs, x.stride(0), weight.packed.stride(0), weight.group, weight.zero, part),
        BITS=weight.bits,
        OFFSET=weight.offsets is not None,
        BIAS=bias is not None and splits == 1,
        WIDE=not x.is_cuda,
        BN=OUTPUTS,
        BT=block,
        BK=INPUTS,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,  # a number times its scale is rounded before the offset is added, as when it is dequantized
    )
    if splits > 1:
        size = rows * outputs
        args = (parts, out if bias is None else bias, out, size, outputs, splits)
        _add_parts[(triton.cdiv(size, 1024),)](*args, BIAS=bias is not None, TILE=1024)
    return out
