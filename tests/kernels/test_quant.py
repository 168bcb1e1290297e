"""Quantized weights: every format unpacks to what its own arithmetic says, and the kernel multiplies by exactly that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

pytest.importorskip("triton")

from kernels import quant_linear, quant_weight, reference_quant
from kernels.quant_weight import QuantWeight

GGUF = {
    "Q4_0": (GGMLQuantizationType.Q4_0, quant_weight.from_q4_0),
    "Q4_1": (GGMLQuantizationType.Q4_1, quant_weight.from_q4_1),
    "Q8_0": (GGMLQuantizationType.Q8_0, quant_weight.from_q8_0),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gguf(name: str, outputs: int, inputs: int) -> tuple[QuantWeight, Tensor]:
    """A random weight in a GGUF format, and its values by the format's own package."""
    kind, read = GGUF[name]
    raw = quants.quantize(torch.randn(outputs, inputs).numpy(), kind)
    return read(torch.from_numpy(raw.copy()), outputs), torch.from_numpy(quants.dequantize(raw, kind))


def pack(numbers: Tensor, order: tuple[int, ...]) -> Tensor:
    """uint8 [rows, n] -> int32 [rows, n / 8]: half-byte i of a word holds column order[i] of its eight."""
    words = np.zeros((len(numbers), numbers.shape[1] // 8), dtype=np.uint32)
    for i, column in enumerate(order):
        words |= numbers[:, column::8].numpy().astype(np.uint32) << (4 * i)
    return torch.from_numpy(words.view(np.int32))


def grouped(outputs: int, inputs: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """numbers [K, N], zeros and scales [K / group, N], and (numbers - zeros) * scales as a weight [N, K]."""
    numbers = torch.randint(0, 16, (inputs, outputs), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (inputs // group, outputs), dtype=torch.uint8)
    scales = (torch.rand(inputs // group, outputs) + 0.1).half()
    long = [t.float().repeat_interleave(group, 0) for t in (zeros, scales)]
    return numbers, zeros, scales, ((numbers.float() - long[0]) * long[1]).t()


def awq(outputs: int, inputs: int, group: int) -> tuple[QuantWeight, Tensor]:
    numbers, zeros, scales, values = grouped(outputs, inputs, group)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return quant_weight.from_awq(pack(numbers, order), pack(zeros, order), scales), values


def gptq(outputs: int, inputs: int, group: int) -> tuple[QuantWeight, Tensor]:
    numbers, zeros, scales, values = grouped(outputs, inputs, group)
    order = tuple(range(8))
    packed = pack(numbers.t().contiguous(), order).t().contiguous()
    g_idx = torch.arange(inputs, dtype=torch.int32) // group
    return quant_weight.from_gptq(packed, pack((zeros - 1) & 15, order), scales, g_idx), values


def float8(outputs: int, inputs: int) -> tuple[QuantWeight, Tensor]:
    weight = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    scale = torch.rand(outputs) + 0.5
    return quant_weight.from_float8(weight, scale), weight.float() * scale[:, None]


def int8(outputs: int, inputs: int) -> tuple[QuantWeight, Tensor]:
    """A scale per output."""
    weight, scale = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs, 1)
    return QuantWeight(weight, scale, inputs), weight.float() * scale


def made(name: str, outputs: int, inputs: int) -> tuple[QuantWeight, Tensor]:
    if name in GGUF:
        return gguf(name, outputs, inputs)
    if name in ("awq", "gptq"):
        return (awq if name == "awq" else gptq)(outputs, inputs, 128)
    return (float8 if name == "float8" else int8)(outputs, inputs)


FORMATS = [*GGUF, "awq", "gptq", "float8", "int8"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_unpacks_to_what_it_says(name: str) -> None:
    weight, values = made(name, 40, 256)
    assert (weight.out_features, weight.in_features) == (40, 256)
    torch.testing.assert_close(weight.dequantize(torch.float32), values, rtol=0, atol=1e-6 if name in ("awq", "gptq") else 0)


def check(
    weight: QuantWeight, rows: int, dtype: torch.dtype, device: torch.device, splits: int = 0, with_bias: bool = False
) -> None:
    x = torch.randn(rows, weight.in_features + 8, device=device).to(dtype)[:, : weight.in_features]
    bias = torch.randn(weight.out_features, device=device).to(dtype) if with_bias else None
    found, expected = quant_linear.linear(x, weight.to(device), bias, splits), reference_quant.linear(x, weight.to(device), bias)
    assert found.dtype == dtype and found.shape == expected.shape
    scale = max(float(expected.float().abs().mean()), 1.0) if rows else 1.0
    step = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=step, atol=step * scale)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 72, 384), (7, 40, 256)])
def test_the_kernel_multiplies_by_the_dequantized_weight(
    name: str, rows: int, outputs: int, inputs: int, device: torch.device
) -> None:
    weight, _ = made(name, outputs, inputs)
    check(weight, rows, torch.float32, device)
    check(weight, rows, torch.float16, device, splits=2, with_bias=True)


@pytest.mark.parametrize("splits", [1, 3])
def test_inputs_that_fill_no_tile(splits: int, device: torch.device) -> None:
    for name in GGUF:
        check(made(name, 65, 288)[0], 3, torch.bfloat16, device, splits, with_bias=splits == 1)
    check(made("Q4_1", 8, 64)[0], 70, torch.float32, device)  # more rows than a tile
    check(made("Q8_0", 8, 64)[0], 0, torch.float32, device)


def test_a_unit_vector_reads_one_column_exactly(device: torch.device) -> None:
    for name in FORMATS:
        weight, _ = made(name, 24, 256)
        x = torch.zeros(4, 256, device=device)
        x[range(4), [0, 15, 16, 255]] = 1.0
        found = quant_linear.linear(x, weight.to(device))
        assert torch.equal(found.cpu(), weight.dequantize(torch.float32)[:, [0, 15, 16, 255]].t()), name


def test_a_rows_bits_do_not_depend_on_its_company_within_a_tile(device: torch.device) -> None:
    weight = made("Q4_0", 64, 512)[0].to(device)
    x = torch.randn(9, 512, device=device)
    together = quant_linear.linear(x, weight)
    assert all(torch.equal(together[i : i + 1], quant_linear.linear(x[i : i + 1], weight)) for i in range(9))


def test_a_row_of_nan_hurts_no_other(device: torch.device) -> None:
    weight = made("Q8_0", 40, 64)[0].to(device)
    x = torch.randn(3, 64, device=device)
    x[1, 5] = torch.nan
    found = quant_linear.linear(x, weight)
    assert found[1].isnan().all() and not found[[0, 2]].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 8, 64, 200])
def test_the_kernel_at_full_size(name: str, rows: int, device: torch.device) -> None:
    check(made(name, 4096, 4096)[0], rows, torch.bfloat16, device)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 64"):
        QuantWeight(torch.zeros(4, 96, dtype=torch.int8), torch.ones(4, 1), 64)
    with pytest.raises(ValueError, match="offsets"):
        QuantWeight(torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1), 64, torch.ones(4, 2))
    with pytest.raises(ValueError, match="blocks of 18"):
        quant_weight.from_q4_0(torch.zeros(100, dtype=torch.uint8), 4)
    words = torch.zeros(16, 8, dtype=torch.int32)
    with pytest.raises(ValueError, match="desc_act"):
        quant_weight.from_gptq(words, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 8), torch.arange(128) % 2)
