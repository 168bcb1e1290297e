"""Quantized checkpoints that lie output by output, as QuantWeight: compressed-tensors' packed integers, int8, float8.

Of compressed-tensors the layouts "pack-quantized", "int-quantized" and "float-quantized"; float8 also in blocks of outputs and
inputs, as DeepSeek-V3 has it (arXiv 2412.19437).
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from kernels.quant_weight import QuantWeight, half_bytes, in_runs


def from_packed(words: Tensor, scales: Tensor, bits: int, zeros: Tensor | None = None) -> QuantWeight:
    """words int32 [N, K / 8] (four bits) or [N, K / 4] (eight), each number stored more by half its range; scales [N, groups], or
    of each row, or of all. zeros: what numbers are counted from, else 0; packed likewise along the outputs, [N / 8, groups]."""
    numbers, scales = _numbers(words, bits), _each_row(scales, len(words))
    known = None if zeros is None else _numbers(zeros.t(), bits).t()
    if bits == 4:
        group = numbers.shape[1] // scales.shape[1]
        if known is None:
            return QuantWeight(in_runs(numbers), scales, group, None, 8)
        return QuantWeight(in_runs(numbers), scales, group, _offsets(known.float(), scales))
    signed = (numbers ^ 128).view(torch.int8)
    return from_int8(signed, scales, None if known is None else known.float() - 128)


def from_int8(numbers: Tensor, scales: Tensor, zeros: Tensor | None = None) -> QuantWeight:
    """int8 [N, K]; scales of the whole weight (one element) or [N, groups]; zeros likewise, of any type."""
    scales = _each_row(scales, len(numbers))
    offsets = None
    if zeros is not None and bool(zeros.any()):
        offsets = _offsets(_each_row(zeros, len(numbers)).float(), scales)
    return QuantWeight(numbers.contiguous(), scales, numbers.shape[1] // scales.shape[1], offsets)


def from_float8(numbers: Tensor, scales: Tensor, block: tuple[int, int] | None = None) -> QuantWeight:
    """float8_e4m3fn [N, K] with a scale of the whole weight (one element), of each row ([N] or [N, 1]), or of each block of so
    many outputs and inputs, [N / outputs, K / inputs] rounded up."""
    rows, columns = numbers.shape
    if block is None:
        return QuantWeight(numbers.contiguous(), _each_row(scales, rows), columns)
    group = gcd(block[1], columns)
    scales = scales.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1] // group, 1)[:, : columns // group]
    return QuantWeight(numbers.contiguous(), scales.contiguous(), group)


def _numbers(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, n * bits / 32] -> uint8 [rows, n]."""
    return half_bytes(words) if bits == 4 else words.contiguous().view(torch.uint8)


def _each_row(scales: Tensor, rows: int) -> Tensor:
    """[N, groups] from as much, from [N], or from one for all."""
    scales = scales if scales.dim() == 2 else scales.reshape(-1, 1)
    return scales.expand(rows, -1).contiguous()


def _offsets(zeros: Tensor, scales: Tensor) -> Tensor:
    return -(zeros * scales.float()).contiguous()
