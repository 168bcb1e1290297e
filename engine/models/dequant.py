"""Unpacking GGUF's quantized blocks straight into the target dtype, one cache-sized piece at a time.

The common small types are written out here: the `gguf` package needs 1.3 s for the 135M model's tensors where this needs
0.2 s, and makes three float32 copies of each. Everything else (the k-quants, the i-quants) goes through that package,
also in pieces. The arithmetic is the package's own, in float32, so the results are equal bit for bit after rounding.

Block layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.gguf_file import TENSOR_TYPES

# Elements. Three float32 temporaries stay in the second-level cache, and below 32,768 torch uses one thread: with two other
# busy processes on two cores, pieces that two threads share made the 135M model take 3 to 11 s instead of 0.8 s.
_PIECE = 32512
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def dequantize(raw: NDArray[np.uint8], tensor_type: int, shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The tensor of GGUF type `tensor_type` (a key of TENSOR_TYPES) stored in `raw` [bytes], as `dtype`, shape `shape`.

    Raises ValueError when the type has no dequantizer or the bytes do not fit the shape.
    """
    name, block, block_bytes = TENSOR_TYPES[tensor_type]
    out = torch.empty(shape, dtype=dtype)
    if out.numel() % block or raw.nbytes != out.numel() // block * block_bytes:
        raise ValueError(f"{raw.nbytes} bytes of {name} do not hold a tensor of shape {shape}")
    blocks, flat = raw.reshape(-1, block_bytes), out.view(-1)
    unpack = _UNPACK.get(name) or (_plain(_PLAIN[name]) if name in _PLAIN else _package(tensor_type, name))
    step = max(_PIECE // block, 1)
    for first in range(0, len(blocks), step):
        piece = blocks[first : first + step].copy()  # out of the read-only mapping
        unpack(torch.from_numpy(piece), flat[first * block : (first + len(piece)) * block].view(-1, block))
    return out


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of every block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(blocks: Tensor, at: int) -> Tensor:
    """32 four-bit numbers from 16 bytes: all low halves, then all high halves. uint8 [n, 32]."""
    packed = blocks[:, at:]
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_((_nibbles(blocks, 2).view(torch.int8) - 8).float().mul_(_half(blocks, 0)))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    out.copy_(_nibbles(blocks, 4).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2)))


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0)))


_UNPACK: dict[str, Callable[[Tensor, Tensor], None]] = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q8_0": _q8_0}


def _plain(stored: torch.dtype) -> Callable[[Tensor, Tensor], None]:
    def unpack(blocks: Tensor, out: Tensor) -> None:
        out.copy_(blocks.view(stored))

    return unpack


def _package(tensor_type: int, name: str) -> Callable[[Tensor, Tensor], None]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as package_dequantize

    kind = GGMLQuantizationType(tensor_type)

    def unpack(blocks: Tensor, out: Tensor) -> None:
        try:
            with np.errstate(all="ignore"):  # infinite scales in a damaged file show as NaN logits, not as numpy warnings
                values = package_dequantize(blocks.numpy(), kind)
        except NotImplementedError:
            raise ValueError(f"tensors of type {name} cannot be dequantized") from None
        out.copy_(torch.from_numpy(values))

    return unpack
