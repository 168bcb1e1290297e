"""The plain-torch twin of kernels.quant_linear: what is "correct" there."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.quant_weight import QuantWeight


def linear(x: Tensor, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times the dequantized weight [N, K] (rounded to x's type) transposed, summed in float32, plus bias [N]."""
    out = F.linear(x.float(), weight.dequantize(x.dtype).float())
    return (out if bias is None else out + bias.float()).to(x.dtype)
