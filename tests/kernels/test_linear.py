"""The linear layer of deterministic mode: its twin's results, and a row's bits whoever shares the call."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels import linear, reference
from tests.kernels.ordered import in_order

STEP = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def made(
    rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and bias; the rows of x and weight are not contiguous."""
    x = torch.randn(rows, inputs + 8, device=device).to(dtype)[:, :inputs]
    weight = torch.randn(outputs, inputs + 16, device=device).to(dtype)[:, :inputs]
    return x, weight, torch.randn(outputs, device=device).to(dtype)


def check(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, splits: int = 0) -> None:
    x, weight, bias = made(rows, outputs, inputs, dtype, device)
    for added in (None, bias):
        found, expected = linear.linear(x, weight, added, splits), reference.linear(x, weight, added)
        assert found.dtype == dtype and found.shape == expected.shape
        scale = max(float(expected.float().abs().mean()), 1.0) if rows else 1.0
        torch.testing.assert_close(found.float(), expected.float(), rtol=STEP[dtype], atol=STEP[dtype] * scale)


@pytest.mark.parametrize("dtype", list(STEP))
@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 111, 64), (7, 65, 200), (70, 8, 33), (0, 8, 64)])
def test_it_is_a_matrix_product(rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> None:
    check(rows, outputs, inputs, dtype, device)
    check(rows, outputs, inputs, dtype, device, splits=2)


def check_bits(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device, sizes: list[int], splits: int = 0) -> None:
    """Every row of a batch, alone and among the first so many."""
    x, weight, bias = made(max(sizes), outputs, inputs, dtype, device)
    together = linear.linear(x, weight, bias, splits)
    for size in sizes:
        for first in range(0, len(x) - size + 1, max(size, len(x) // 8)):
            part = linear.linear(x[first : first + size], weight, bias, splits)
            assert torch.equal(part, together[first : first + size]), (size, first)


@pytest.mark.parametrize("dtype", list(STEP))
@pytest.mark.parametrize("splits", [1, 3])
def test_a_rows_bits_do_not_depend_on_its_company(
    dtype: torch.dtype, splits: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_order(monkeypatch)
    check_bits(72, 320, dtype, device, [1, 3, 16, 64, 65, 130], splits)


def test_splits_depend_on_the_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 132)
    device = torch.device("cuda")
    assert linear._parts(128256, 4096, 0, device) == (4096, 1)
    part, splits = linear._parts(4096, 14336, 0, device)
    assert part % linear.INPUTS == 0 and part * splits >= 14336 and splits * 64 >= 264
    assert linear._parts(64, 576, 0, device) == (576, 1)  # too short to share


def test_a_row_of_nan_hurts_no_other(device: torch.device) -> None:
    x, weight, _ = made(3, 40, 64, torch.float32, device)
    x[1, 5] = torch.nan
    found = linear.linear(x, weight)
    assert found[1].isnan().all() and not found[[0, 2]].isnan().any()


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        linear.linear(torch.zeros(1, 8, device=device), torch.zeros(4, 9, device=device))
    with pytest.raises(ValueError, match="do not fit"):
        linear.linear(torch.zeros(1, 8, device=device), torch.zeros(4, 8, device=device).half())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(STEP))
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 14336), (49152, 576), (1000, 576)])
def test_at_full_size(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> None:
    for rows in (1, 64, 500):
        check(rows, outputs, inputs, dtype, device)
    check_bits(outputs, inputs, dtype, device, [1, 2, 8, 17, 64, 128, 512])
