"""The twins define "correct", so they are held against torch's own functions and against transparent loops."""

from __future__ import annotations

import math

import pytest
import torch

from engine.models.layers import Linear, RMSNorm
from kernels import reference


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 576), (7, 111), (3, 5, 64)])
def test_the_prepared_norm_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[-1]).to(dtype)
    fast, slow = RMSNorm(weight, 1e-5)(x), reference.rms_norm(x, weight, 1e-5)
    assert fast.dtype == dtype
    torch.testing.assert_close(fast.float(), slow.float(), rtol=8e-3 if dtype == torch.bfloat16 else 2e-6, atol=1e-6)


def test_a_zero_row_is_normed_to_zero() -> None:
    assert torch.equal(RMSNorm(torch.ones(8), 1e-5)(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_rope_rotates_the_two_halves_of_each_head() -> None:
    qk = torch.randn(3, 2, 8)
    angle = torch.randn(3, 1, 4)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    turned = torch.view_as_complex(torch.stack((qk[..., :4], qk[..., 4:]), -1)) * torch.polar(torch.ones_like(angle), angle)
    out = reference.rope_(qk.clone(), cos, sin)
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1))


def test_silu_mul_takes_the_gate_first() -> None:
    x = torch.randn(4, 10)
    torch.testing.assert_close(reference.silu_mul(x), torch.nn.functional.silu(x[:, :5]) * x[:, 5:])


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_packed_linear_is_a_linear(rows: int, dtype: torch.dtype, with_bias: bool) -> None:
    weight, x, addend = torch.randn(40, 24).to(dtype), torch.randn(rows, 24).to(dtype), torch.randn(rows, 40).to(dtype)
    bias = torch.randn(40).to(dtype) if with_bias else None
    linear = Linear(weight, bias)
    expected = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(linear(x).double(), expected, **tolerance)
    torch.testing.assert_close(linear.add_to(x, addend).double(), expected + addend.double(), **tolerance)


def test_written_keys_and_values_are_found_at_their_slots() -> None:
    blocks, kv_heads, block_size, size = 5, 3, 4, 6
    kv = torch.zeros(blocks, 2, kv_heads, block_size, size)
    new, slots = torch.randn(4, 2, kv_heads, size), torch.tensor([0, 19, 6, 7])
    reference.write_kv(kv, new, slots)
    for row, slot in enumerate(slots.tolist()):
        assert torch.equal(kv[slot // block_size, :, :, slot % block_size], new[row])
    assert int((kv != 0).sum()) == new.numel()


def test_commit_reads_everything_before_it_writes() -> None:
    kv = torch.randn(2, 4, 2, 3, 4, 6)
    before = kv.clone()
    source, target = torch.tensor([5, 6, 9]), torch.tensor([6, 5, 7])  # a swap: any order of single copies loses one
    reference.commit_kv(kv, source, target)
    for s, t in zip(source.tolist(), target.tolist(), strict=True):
        assert torch.equal(kv[:, t // 4, :, :, t % 4], before[:, s // 4, :, :, s % 4])
    untouched = [slot for slot in range(16) if slot not in target.tolist()]
    for slot in untouched:
        assert torch.equal(kv[:, slot // 4, :, :, slot % 4], before[:, slot // 4, :, :, slot % 4])


def test_blocks_are_copied_whole() -> None:
    kv = torch.randn(2, 4, 2, 3, 4, 6)
    before = kv.clone()
    reference.copy_blocks(kv, torch.tensor([0, 3]), torch.tensor([2, 1]))
    assert torch.equal(kv[:, 2], before[:, 0]) and torch.equal(kv[:, 1], before[:, 3])


def test_tree_attention_of_a_chain_is_causal_attention() -> None:
    """One sequence over three blocks that do not lie in order, against torch's own attention on the dense context."""
    heads, kv_heads, size, block_size, context, rows = 6, 2, 8, 4, 5, 4
    kv = torch.randn(7, 2, kv_heads, block_size, size)
    table = torch.tensor([[6, 1, 3]])
    dense = kv[table[0]].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, size)[:, :, : context + rows]
    q = torch.randn(rows, heads, size)
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    out = reference.tree_attention(q, kv, table, torch.tensor([0, rows]), torch.tensor([context]), causal, 1 / math.sqrt(size))
    seen = torch.cat((torch.ones(rows, context, dtype=torch.bool), causal), 1)
    keys, values = (part.repeat_interleave(heads // kv_heads, 0) for part in dense)
    expected = torch.nn.functional.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=seen)
    torch.testing.assert_close(out, expected.transpose(0, 1))
