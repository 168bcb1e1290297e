"""Quantized weights in the one layout that kernels.quant_linear reads: value = (q - zero) * scale + offset, by groups of inputs.

Four-bit numbers lie two to a byte, in runs of 32 inputs: byte j of a run's 16 holds inputs j (low half) and j + 16, as in
GGUF. Every format is brought there when it is loaded, bit for bit: GGUF's blocks (ggml-common.h) by taking scales and numbers
apart, AWQ (arXiv 2306.00978) and GPTQ (arXiv 2210.17323) checkpoints by packing anew along the inputs.
It quantizes nothing: weights come quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RUN = 32
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # column c of eight lies in half-byte AWQ_ORDER[c] of a word


@dataclass(frozen=True, slots=True)
class QuantWeight:
    """packed: uint8 [N, K / 2] (four bits), int8 or float8_e4m3fn [N, K]; scales [N, K / group] of any float type; offsets, where
    there are any, [N, K / group]; zero: what q is counted from. Raises ValueError for shapes that do not fit."""

    packed: Tensor
    scales: Tensor
    group: int
    offsets: Tensor | None = None
    zero: int = 0

    def __post_init__(self) -> None:
        groups = (self.out_features, self.in_features // self.group)
        if self.in_features % RUN or self.group % RUN or self.in_features % self.group or self.scales.shape != groups:
            raise ValueError(f"{tuple(self.scales.shape)} scales do not fit {self.in_features} inputs in groups of {self.group}")
        if self.offsets is not None and self.offsets.shape != groups:
            raise ValueError(f"{tuple(self.offsets.shape)} offsets do not fit {groups} groups")

    @property
    def bits(self) -> int:
        return 4 if self.packed.dtype == torch.uint8 else 8

    @property
    def out_features(self) -> int:
        return self.packed.shape[0]

    @property
    def in_features(self) -> int:
        return self.packed.shape[1] * 8 // self.bits

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K], computed in float32 and rounded once."""
        q = self.packed
        if self.bits == 4:
            runs = q.view(len(q), -1, RUN // 2)
            q = torch.cat((runs & 15, runs >> 4), -1)
        values = (q.float() - self.zero).view(*self.scales.shape, self.group) * self.scales.float().unsqueeze(-1)
        if self.offsets is not None:
            values = values + self.offsets.float().unsqueeze(-1)
        return values.view(self.out_features, -1).to(dtype)

    def to(self, device: torch.device | str) -> QuantWeight:
        offsets = None if self.offsets is None else self.offsets.to(device)
        return QuantWeight(self.packed.to(device), self.scales.to(device), self.group, offsets, self.zero)


def from_q4_0(raw: Tensor, out_features: int) -> QuantWeight:
    """GGUF Q4_0, bytes of blocks of 32 (a float16 scale, 16 bytes of numbers counted from 8)."""
    blocks = _blocks(raw, out_features, 18)
    return QuantWeight(_bytes(blocks, 2), _halves(blocks, 0), RUN, None, 8)


def from_q4_1(raw: Tensor, out_features: int) -> QuantWeight:
    """GGUF Q4_1, bytes of blocks of 32 (a float16 scale, a float16 offset, 16 bytes of numbers)."""
    blocks = _blocks(raw, out_features, 20)
    return QuantWeight(_bytes(blocks, 4), _halves(blocks, 0), RUN, _halves(blocks, 2))


def from_q8_0(raw: Tensor, out_features: int) -> QuantWeight:
    """GGUF Q8_0, bytes of blocks of 32 (a float16 scale, 32 signed bytes)."""
    blocks = _blocks(raw, out_features, 34)
    return QuantWeight(_bytes(blocks, 2).view(torch.int8), _halves(blocks, 0), RUN)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> QuantWeight:
    """AWQ (the "gemm" layout), four bits: qweight [K, N / 8], qzeros [K / group, N / 8] int32, scales [K / group, N]."""
    return _planar(_columns(qweight, AWQ_ORDER), _columns(qzeros, AWQ_ORDER), scales)


def from_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None) -> QuantWeight:
    """GPTQ (its first format), four bits: qweight [K / 8, N], qzeros [K / group, N / 8] int32, each zero stored less one; scales
    [K / group, N]. Raises ValueError for groups out of order ("desc_act")."""
    numbers = _columns(qweight.t(), tuple(range(8))).t()
    group = len(numbers) // len(scales)
    if g_idx is not None and not torch.equal(g_idx.cpu().long(), torch.arange(len(numbers)) // group):
        raise ValueError("a GPTQ checkpoint whose groups are out of order (desc_act) is not supported")
    return _planar(numbers, _columns(qzeros, tuple(range(8))) + 1 & 15, scales)


def from_float8(weight: Tensor, scale: Tensor) -> QuantWeight:
    """float8_e4m3fn [N, K] with a scale of the whole weight (one element) or of each row ([N] or [N, 1])."""
    rows, columns = weight.shape
    return QuantWeight(weight.contiguous(), scale.reshape(-1, 1).expand(rows, 1).contiguous(), columns)


def _blocks(raw: Tensor, out_features: int, size: int) -> Tensor:
    """uint8 [N, K / 32, size]. Raises ValueError when the bytes are no whole blocks of so many rows."""
    if raw.numel() % (out_features * size):
        raise ValueError(f"{raw.numel()} bytes are not {out_features} rows of blocks of {size}")
    return raw.view(torch.uint8).reshape(out_features, -1, size)


def _halves(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, :, at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _bytes(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, :, at:].reshape(len(blocks), -1)


def _columns(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """int32 [rows, n / 8] -> uint8 [rows, n]: column c of eight from half-byte order[c]."""
    shifts = torch.tensor(order, dtype=torch.int32, device=words.device) * 4
    return (words.unsqueeze(-1) >> shifts & 15).to(torch.uint8).flatten(1)


def _planar(numbers: Tensor, zeros: Tensor, scales: Tensor) -> QuantWeight:
    """From numbers [K, N], zeros and scales [K / group, N]."""
    runs = numbers.t().reshape(numbers.shape[1], -1, 2, RUN // 2)
    packed = (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1)
    # (q - z) * s = q * s - z * s: in float32 the product of four bits and a half float is exact.
    offsets = -(zeros.float() * scales.float()).t().contiguous()
    return QuantWeight(packed.contiguous(), scales.t().contiguous(), len(numbers) // len(scales), offsets)
