"""Matrices in rows of 32-input blocks, for kernels that multiply with them as they are: a GGUF file's, and what maps onto such.

A Hugging Face checkpoint's weight (kernels/quant_weight.py) does where its scales are float16 numbers: the blocks are then worth
exactly what it is worth.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.gguf_file import TENSOR_TYPES
from engine.models.dequant import dequantize
from kernels import quant_weight
from kernels.quant_weight import RUN, QuantWeight

BLOCK_TYPES = frozenset({"Q4_0", "Q4_1", "Q8_0"})
Q4_Z = -1  # not of GGUF: a float16 scale, a float16 zero, 16 bytes of numbers; (number - zero) * scale
_TYPES = {**TENSOR_TYPES, Q4_Z: ("Q4_Z", 32, 20)}
_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
_READERS = {"Q4_0": quant_weight.from_q4_0, "Q4_1": quant_weight.from_q4_1, "Q8_0": quant_weight.from_q8_0}


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [N, K] of one of BLOCK_TYPES, or of Q4_Z. `raw` may be a view of the file: drop it soon."""

    raw: NDArray[np.uint8]  # [N, bytes of a row], C-contiguous
    type: int  # key of TENSOR_TYPES, or Q4_Z

    @property
    def type_name(self) -> str:
        return _TYPES[self.type][0]

    @property
    def inputs(self) -> int:
        _, elements, size = _TYPES[self.type]
        return self.raw.shape[1] // size * elements

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if self.type == Q4_Z:
            return self.weight().dequantize(dtype)
        return dequantize(self.raw.reshape(-1), self.type, (len(self.raw), self.inputs), dtype)

    def weight(self) -> QuantWeight:
        """The same for kernels/quant_linear.py, in memory of its own."""
        raw = torch.from_numpy(np.array(self.raw))
        if self.type != Q4_Z:
            return _READERS[self.type_name](raw, len(raw))
        blocks = raw.view(len(raw), -1, 20)
        scales, zeros = blocks[:, :, :4].contiguous().view(torch.float16).unbind(-1)
        offsets = -(zeros.float() * scales.float())
        return QuantWeight(blocks[:, :, 4:].flatten(1), scales.contiguous(), RUN, offsets)


def blocks_of(weight: QuantWeight) -> Blocks | None:
    """Blocks worth exactly what the weight is worth; None where there are none: float8, scales that are no float16, eight bits
    counted from anything but 0."""
    scales = weight.scales.to(torch.float16)
    if weight.packed.dtype not in (torch.uint8, torch.int8) or not torch.equal(scales.float(), weight.scales.float()):
        return None
    heads = [scales]
    if weight.bits == 8:
        if weight.zero or weight.offsets is not None:
            return None
        kind = _NUMBERS["Q8_0"]
    else:
        zeros = _zeros(weight)
        if zeros is None:
            return None
        kind = _NUMBERS["Q4_0"] if bool((zeros == 8).all()) else Q4_Z
        heads += [zeros.to(torch.float16)] if kind == Q4_Z else []
    runs = weight.in_features // RUN
    head = torch.stack(heads, -1).repeat_interleave(weight.group // RUN, 1).contiguous().view(torch.uint8)
    numbers = weight.packed.contiguous().view(torch.uint8).view(weight.out_features, runs, -1)
    return Blocks(torch.cat((head, numbers), -1).flatten(1).numpy(), kind)


def _zeros(weight: QuantWeight) -> Tensor | None:
    """What each group's numbers of four bits are counted from, [N, groups] of whole numbers; None where it is no such number."""
    scales = weight.scales.float()
    if weight.offsets is None:
        return torch.full_like(scales, weight.zero)
    zeros = torch.where(scales == 0, 0, -weight.offsets.float() / scales).round_().add_(weight.zero)
    fit = (zeros - weight.zero) * scales == -weight.offsets.float()
    return zeros if bool((fit & (zeros >= 0) & (zeros < 32)).all()) else None
