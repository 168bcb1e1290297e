"""Our dequantizers give, bit for bit, what the `gguf` package gives and rounding then makes of it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from engine.gguf_file import TENSOR_TYPES
from engine.models import dequant
from engine.models.dequant import dequantize

IDS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}
OURS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]
THEIRS = ["Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL"]
SHAPE = (21, 256)  # odd in rows


def random_blocks(name: str) -> np.ndarray:
    """Random bytes: every scale, sign and nibble, infinities and NaNs among them."""
    _, block, block_bytes = TENSOR_TYPES[IDS[name]]
    count = SHAPE[0] * SHAPE[1] // block
    return np.random.default_rng(0).integers(0, 256, size=count * block_bytes, dtype=np.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", OURS + THEIRS)
def test_equal_to_the_package(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequant, "_PIECE", 1000)  # many pieces, the last of them short
    raw = random_blocks(name)
    ours = dequantize(raw, IDS[name], SHAPE, dtype)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(IDS[name])).astype(np.float32).reshape(SHAPE)
    wanted = torch.from_numpy(theirs.copy()).to(dtype)
    assert (ours.shape, ours.dtype) == (SHAPE, dtype)
    assert torch.equal(ours.isnan(), wanted.isnan())
    assert torch.equal(ours.nan_to_num(), wanted.nan_to_num())


def test_types_nobody_can_unpack_are_named() -> None:
    with pytest.raises(ValueError, match="Q8_1"):
        dequantize(np.zeros(36, dtype=np.uint8), IDS["Q8_1"], (32,))


@pytest.mark.parametrize("shape", [(31,), (64,), (1, 33)])
def test_bytes_that_do_not_fit_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not hold"):
        dequantize(np.zeros(34, dtype=np.uint8), IDS["Q8_0"], shape)
