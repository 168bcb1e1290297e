"""The kernels between a layer's matrix products (norm, rotary, activation) against their plain-torch twins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import act, norm, reference, rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FULL = [(8, 4096), (256, 2048), (2048, 8192)]  # rows, columns


def close(found: Tensor, expected: Tensor) -> None:
    """Equal up to an intermediate rounding of the twin's, in its own type."""
    assert found.dtype == expected.dtype
    step = {torch.float32: 4e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}[found.dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=step, atol=step, equal_nan=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def wide(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows that lie further apart than they are long."""
    return (torch.randn(rows, columns + 3, device=device) * 2).to(dtype)[:, :columns]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 576), (3, 111), (7, 64), (0, 16)])
def test_norms(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    check_norms(rows, columns, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), FULL)
def test_norms_at_full_size(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    check_norms(rows, columns, dtype, device)


def check_norms(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
    x, residual = wide(rows, columns, dtype, device), wide(rows, columns, dtype, device)
    weight = torch.randn(columns, device=device).to(dtype)
    close(norm.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    kept = x.clone(), residual.clone()
    (found, total), (expected, sum_) = (f(x, residual, weight, 1e-5) for f in (norm.add_rms_norm, reference.add_rms_norm))
    close(total, sum_)
    if dtype != torch.bfloat16 or device.type == "cuda":  # the interpreter cuts bfloat16 off where hardware rounds
        assert torch.equal(total, sum_)
    close(found, expected)
    assert torch.equal(x, kept[0]) and torch.equal(residual, kept[1])


def test_a_norm_takes_any_leading_dimensions_and_a_row_of_nan(device: torch.device) -> None:
    x = torch.randn(2, 3, 40, device=device)
    x[1, 1, 7], x[0, 0] = torch.nan, 0.0
    weight = torch.randn(40, device=device)
    found = norm.rms_norm(x, weight, 1e-5)
    close(found, reference.rms_norm(x, weight, 1e-5))
    assert found[1, 1].isnan().all() and not found[1, 0].isnan().any() and not found[0, 0].any()


def test_a_rows_norm_does_not_depend_on_its_company(device: torch.device) -> None:
    x, weight = torch.randn(7, 576, device=device), torch.randn(576, device=device)
    together = norm.rms_norm(x, weight, 1e-5)
    assert all(torch.equal(together[i : i + 1], norm.rms_norm(x[i : i + 1], weight, 1e-5)) for i in range(7))


def test_a_row_that_no_program_can_hold_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="65536"):
        norm.rms_norm(torch.zeros(1, 65537, device=device), torch.ones(65537, device=device), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "half"), [(1, 1536), (3, 111), (7, 2049), (0, 8)])
def test_silu_mul(rows: int, half: int, dtype: torch.dtype, device: torch.device) -> None:
    x = wide(rows, 2 * half, dtype, device)
    close(act.silu_mul(x), reference.silu_mul(x))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "half"), FULL)
def test_silu_mul_at_full_size(rows: int, half: int, dtype: torch.dtype, device: torch.device) -> None:
    x = wide(rows, 2 * half, dtype, device)
    close(act.silu_mul(x), reference.silu_mul(x))


def test_silu_of_large_gates_neither_overflows_nor_dies(device: torch.device) -> None:
    x = torch.tensor([[-500.0, 500.0, torch.nan, 2.0, 2.0, 2.0]], device=device)
    close(act.silu_mul(x), torch.tensor([[0.0, 1000.0, torch.nan]], device=device))


def tables(positions: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.outer(torch.arange(positions), 10000.0 ** (-torch.arange(0, size, 2) / size))
    cos, sin = angle.cos(), angle.sin()
    return tuple(torch.cat(t, -1).unsqueeze(1).to(device, dtype) for t in ((cos, cos), (-sin, sin)))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "heads", "size"), [(1, 1, 64), (3, 5, 80), (7, 12, 48), (0, 2, 64)])
def test_rope(rows: int, heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
    cos, sin = tables(rows, size, dtype, device)
    qkv = wide(rows, (heads + 2) * size, dtype, device)  # the heads to be rotated are a part of each row
    found, expected = qkv.clone(), qkv.clone()
    part = [t[:, : heads * size].unflatten(1, (heads, size)) for t in (found, expected)]
    assert rope.rope_(part[0], cos, sin).data_ptr() == found.data_ptr()
    expected[:, : heads * size] = reference.rope_(part[1].clone(), cos, sin).flatten(1)
    close(found, expected)
    assert torch.equal(found[:, heads * size :], qkv[:, heads * size :])


def check_fused(
    rows: int, heads: tuple[int, int], size: int, block_size: int, normed: bool, dtype: torch.dtype, device: torch.device
) -> None:
    num_heads, kv_heads = heads
    cos, sin = tables(64, size, dtype, device)
    qkv = wide(rows, (num_heads + 2 * kv_heads) * size, dtype, device)
    blocks = -(-rows // block_size) + 2
    kv = torch.randn(blocks, 2, kv_heads, block_size, size, device=device).to(dtype)
    positions = torch.randint(0, 64, (rows,), device=device)
    slots = torch.randperm(blocks * block_size, device=device)[:rows]
    slots[rows // 2] = -1  # a padded row
    weights = [torch.randn(size, device=device).to(dtype) if normed else None for _ in range(2)]
    results = []
    for fused in (rope.rope_write_kv_, reference.rope_write_kv_):
        own_qkv, own_kv = qkv.clone(), kv.clone()
        q = fused(own_qkv, cos, sin, positions, own_kv, slots, num_heads, *weights, 1e-6)
        assert q.shape == (rows, num_heads, size) and q.data_ptr() == own_qkv.data_ptr()
        results.append((own_qkv, own_kv))
    close(results[0][0], results[1][0])
    close(results[0][1], results[1][1])
    written = torch.zeros(blocks * block_size, dtype=torch.bool, device=device)
    written[slots[slots >= 0]] = True
    for _, own_kv in results:
        rest = [t.transpose(1, 3).flatten(0, 1)[~written] for t in (own_kv, kv)]  # one row per slot
        assert torch.equal(*rest)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("rows", "heads", "size", "block_size"), [(1, (9, 3), 64, 16), (3, (5, 1), 80, 1), (7, (4, 4), 32, 3)])
def test_the_fused_rotation_and_cache_write(
    rows: int, heads: tuple[int, int], size: int, block_size: int, normed: bool, dtype: torch.dtype, device: torch.device
) -> None:
    check_fused(rows, heads, size, block_size, normed, dtype, device)


@pytest.mark.gpu
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rows", [1, 64, 2048])
def test_the_fused_rotation_at_full_size(rows: int, normed: bool, device: torch.device) -> None:
    check_fused(rows, (32, 8), 128, 16, normed, torch.bfloat16, device)
