"""Quantized weights: every format unpacks to what its own arithmetic says, and the kernel multiplies by exactly that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

pytest.importorskip("triton")

from kernels import quant_linear, quant_rows, quant_weight, reference_quant
from kernels.quant_weight import QuantWeight
from tests.kernels.ordered import in_order

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
    return quant_rows.from_float8(weight, scale), weight.float() * scale[:, None]


def int8(outputs: int, inputs: int) -> tuple[QuantWeight, Tensor]:
    """A scale per output."""
    weight, scale = torch.randint(-128, 128, (outputs, inputs), dtype=torch.int8), torch.rand(outputs, 1)
    return QuantWeight(weight, scale, inputs), weight.float() * scale


def packed(outputs: int, inputs: int, bits: int, group: int, symmetric: bool) -> tuple[QuantWeight, Tensor]:
    """compressed-tensors' "pack-quantized": signed numbers, stored more by half their range, the first in the lowest bits."""
    half, count = 1 << bits - 1, 32 // bits
    numbers = torch.randint(-half, half, (outputs, inputs))
    zeros = (
        torch.zeros(outputs, inputs // group, dtype=torch.long)
        if symmetric
        else torch.randint(-half, half, (outputs, inputs // group))
    )
    scales = (torch.rand(outputs, inputs // group) + 0.1).bfloat16()

    def words(values: Tensor) -> Tensor:
        found = np.zeros((len(values), values.shape[1] // count), dtype=np.uint32)
        for i in range(count):
            found |= (values[:, i::count].numpy() + half).astype(np.uint32) << (bits * i)
        return torch.from_numpy(found.view(np.int32))

    stored = None if symmetric else words(zeros.t()).t()
    long = [t.float().repeat_interleave(group, 1) for t in (zeros, scales)]
    return quant_rows.from_packed(words(numbers), scales, bits, stored), (numbers.float() - long[0]) * long[1]


def float8_blocks(outputs: int, inputs: int, block: tuple[int, int]) -> tuple[QuantWeight, Tensor]:
    weight = torch.randn(outputs, inputs).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-outputs // block[0]), -(-inputs // block[1])) + 0.5
    spread = scales.repeat_interleave(block[0], 0)[:outputs].repeat_interleave(block[1], 1)[:, :inputs]
    return quant_rows.from_float8(weight, scales, block), weight.float() * spread


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


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, 128), (8, 128), (8, 256)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_rows_unpack_to_what_they_say(bits: int, group: int, symmetric: bool) -> None:
    weight, values = packed(40, 256, bits, group, symmetric)
    assert weight.group == group and torch.equal(weight.dequantize(torch.float32), values)


@pytest.mark.parametrize(("outputs", "inputs", "block"), [(40, 256, (16, 128)), (40, 96, (32, 64)), (8, 160, (128, 128))])
def test_blocks_of_float8_that_the_sides_need_not_divide_by(outputs: int, inputs: int, block: tuple[int, int]) -> None:
    weight, values = float8_blocks(outputs, inputs, block)
    assert torch.equal(weight.dequantize(torch.float32), values)


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_parts_of_the_values(name: str) -> None:
    weight, _ = made(name, 40, 256)
    values = weight.dequantize(torch.float32)
    ids = torch.tensor([3, 39, 3])
    assert torch.equal(weight.rows(slice(8, 24)).dequantize(torch.float32), values[8:24])
    assert torch.equal(weight.rows(ids).dequantize(torch.float32), values[ids])
    part, uneven = weight.columns(96, 192), weight.columns(16, 64)
    assert part is not None and torch.equal(part.dequantize(torch.float32), values[:, 96:192]) and uneven is None
    together = quant_weight.joined([weight, weight.rows(slice(0, 8))])
    assert together is not None and torch.equal(together.dequantize(torch.float32), torch.cat((values, values[:8])))
    assert (
        weight.columns(0, 32) is not None and quant_weight.joined([part, made("Q4_1", 8, 96)[0], made("Q8_0", 8, 96)[0]]) is None
    )
    size = weight.packed.nbytes + weight.scales.nbytes + (weight.offsets.nbytes if weight.offsets is not None else 0)
    assert weight.nbytes == size


@pytest.mark.parametrize("stored_less", [0, 1])
def test_gptq_with_groups_out_of_order(stored_less: int) -> None:
    numbers, zeros, scales, _ = grouped(16, 64, 32)
    g_idx = torch.randint(0, 2, (64,), dtype=torch.int32)
    order = tuple(range(8))
    tensors = (pack(numbers.t().contiguous(), order).t(), pack((zeros - stored_less) & 15, order), scales)
    values = ((numbers.float() - zeros.float()[g_idx]) * scales.float()[g_idx]).t()
    assert torch.equal(quant_weight.gptq_values(*tensors, g_idx, stored_less), values)
    with pytest.raises(ValueError, match="group 2 of 2"):
        quant_weight.gptq_values(*tensors, g_idx.fill_(2), stored_less)


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


def test_a_rows_bits_do_not_depend_on_its_company_where_the_tile_is_fixed(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order(monkeypatch)
    weight = made("awq", 64, 512)[0].to(device)
    x = torch.randn(70, 512, device=device)
    together = quant_linear.linear(x, weight, fixed=True)
    alone = [quant_linear.linear(part, weight, fixed=True) for part in x.split([1, 1, 3, 17, 48])]
    assert torch.equal(together, torch.cat(alone))


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
