"""Quantized weights in the one layout that kernels.quant_linear reads: value = (q - zero) * scale + offset, by groups of inputs.

Four-bit numbers lie two to a byte, in runs of 32 inputs: byte j of a run's 16 holds inputs j (low half) and j + 16, as in
GGUF. Every format is brought there when it is loaded, bit for bit: GGUF's blocks (ggml-common.h) by taking scales and numbers
apart, AWQ (arXiv 2306.00978) and GPTQ (arXiv 2210.17323) checkpoints by packing anew along the inputs; kernels/quant_rows.py
has the formats that lie output by output.
It quantizes nothing: weights come quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd

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

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + (0 if self.offsets is None else self.offsets.nbytes)

    def to(self, device: torch.device | str) -> QuantWeight:
        return self._with(lambda part: part.to(device))

    def rows(self, index: slice | Tensor) -> QuantWeight:
        """The weight of some outputs, in memory of its own: a range, or ids [R] in their order."""
        return self._with(lambda part: part[index].clone() if isinstance(index, slice) else part.index_select(0, index))

    def columns(self, begin: int, end: int) -> QuantWeight | None:
        """The weight of a range of inputs, in groups as large as the range allows; None where it cuts a run of 32."""
        if begin % RUN or end % RUN:
            return None
        group = gcd(self.group, begin, end - begin)
        half = 2 if self.bits == 4 else 1
        first, last = begin // group, end // group
        scales, offsets = (self._finer(part, group) for part in (self.scales, self.offsets))
        assert scales is not None
        return QuantWeight(
            self.packed[:, begin // half : end // half].contiguous(),
            scales[:, first:last].contiguous(),
            group,
            None if offsets is None else offsets[:, first:last].contiguous(),
            self.zero,
        )

    def _finer(self, part: Tensor | None, group: int) -> Tensor | None:
        return None if part is None else part.repeat_interleave(self.group // group, 1)

    def _with(self, change: Callable[[Tensor], Tensor]) -> QuantWeight:
        offsets = None if self.offsets is None else change(self.offsets)
        return QuantWeight(change(self.packed), change(self.scales), self.group, offsets, self.zero)


def joined(parts: Sequence[QuantWeight]) -> QuantWeight | None:
    """One weight whose outputs are those of all, one after the other; None where they are not of one form."""
    first = parts[0]
    if len({(w.packed.dtype, w.in_features, w.group, w.zero, w.scales.dtype, w.offsets is None) for w in parts}) > 1:
        return None
    offsets = None if first.offsets is None else torch.cat([w.offsets for w in parts if w.offsets is not None])
    packed, scales = torch.cat([w.packed for w in parts]), torch.cat([w.scales for w in parts])
    return QuantWeight(packed, scales, first.group, offsets, first.zero)


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


def from_gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None = None, stored_less: int = 1) -> QuantWeight:
    """GPTQ, four bits: qweight [K / 8, N], qzeros [K / group, N / 8] int32, each zero stored less one (less nothing in the second
    format); scales [K / group, N]. Raises ValueError for groups out of order ("desc_act"): see `gptq_values`."""
    numbers, zeros = _gptq(qweight, qzeros, stored_less)
    group = len(numbers) // len(scales)
    if g_idx is not None and not torch.equal(g_idx.cpu().long(), torch.arange(len(numbers)) // group):
        raise ValueError("a GPTQ checkpoint whose groups are out of order (desc_act) is not supported")
    return _planar(numbers, zeros, scales)


def gptq_values(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, stored_less: int = 1) -> Tensor:
    """The weight [N, K] float32 of a GPTQ checkpoint whose input k is of group g_idx[k]. ValueError: an unknown group."""
    if int(g_idx.min()) < 0 or int(g_idx.max()) >= len(scales):
        raise ValueError(f"group {int(g_idx.max())} of {len(scales)}")
    numbers, zeros = _gptq(qweight, qzeros, stored_less)
    groups = g_idx.long()
    return ((numbers.float() - zeros.float()[groups]) * scales.float()[groups]).t()


def _gptq(qweight: Tensor, qzeros: Tensor, stored_less: int) -> tuple[Tensor, Tensor]:
    """Numbers [K, N] and zeros [K / group, N]."""
    order = tuple(range(8))
    return _columns(qweight.t(), order).t(), _columns(qzeros, order) + stored_less & 15


def _blocks(raw: Tensor, out_features: int, size: int) -> Tensor:
    """uint8 [N, K / 32, size]. Raises ValueError when the bytes are no whole blocks of so many rows."""
    if raw.numel() % (out_features * size):
        raise ValueError(f"{raw.numel()} bytes are not {out_features} rows of blocks of {size}")
    return raw.view(torch.uint8).reshape(out_features, -1, size)


def _halves(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, :, at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def _bytes(blocks: Tensor, at: int) -> Tensor:
    return blocks[:, :, at:].reshape(len(blocks), -1)


def half_bytes(words: Tensor) -> Tensor:
    """int32 [rows, n / 8] -> uint8 [rows, n], from each word's lowest four bits to its highest."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(1)


def _columns(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """int32 [rows, n / 8] -> uint8 [rows, n]: column c of eight from half-byte order[c]."""
    numbers = half_bytes(words).view(len(words), -1, 8)
    return numbers[:, :, order].flatten(1)


def in_runs(numbers: Tensor) -> Tensor:
    """uint8 [N, K] of four bits -> [N, K / 2]. Raises ValueError for inputs that are no whole runs."""
    if numbers.shape[1] % RUN:
        raise ValueError(f"{numbers.shape[1]} inputs are not whole runs of {RUN}")
    runs = numbers.reshape(len(numbers), -1, 2, RUN // 2)
    return (runs[:, :, 0] | runs[:, :, 1] << 4).flatten(1).contiguous()


def _planar(numbers: Tensor, zeros: Tensor, scales: Tensor) -> QuantWeight:
    """From numbers [K, N], zeros and scales [K / group, N]."""
    # (q - z) * s = q * s - z * s: in float32 the product of four bits and a half float is exact.
    offsets = -(zeros.float() * scales.float()).t().contiguous()
    return QuantWeight(in_runs(numbers.t()), scales.t().contiguous(), len(numbers) // len(scales), offsets)
