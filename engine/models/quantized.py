"""Matrices as a GGUF file stores them: rows of 32-input blocks, for kernels that multiply with them as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.gguf_file import TENSOR_TYPES
from engine.models.dequant import dequantize

BLOCK_TYPES = frozenset({"Q4_0", "Q4_1", "Q8_0"})


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [N, K] of one of BLOCK_TYPES. `raw` may be a view of the file: drop it soon."""

    raw: NDArray[np.uint8]  # [N, bytes of a row], C-contiguous
    type: int  # key of TENSOR_TYPES

    @property
    def type_name(self) -> str:
        return TENSOR_TYPES[self.type][0]

    @property
    def inputs(self) -> int:
        _, elements, size = TENSOR_TYPES[self.type]
        return self.raw.shape[1] // size * elements

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return dequantize(self.raw.reshape(-1), self.type, (len(self.raw), self.inputs), dtype)
