"""The sampling kernel against its twin, and both against the engine's own draw: the same tokens, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine import gumbel_max
from engine.gumbel_max import Address
from engine.noise import draft_stream, gumbel, to_gumbel

pytest.importorskip("triton")

from kernels import reference_sampling as reference
from kernels import sample

SEEDS = [0, 7, 2**63 + 12345, 2**64 - 1, 0x9E3779B97F4A7C15]


def addresses(count: int) -> list[Address]:
    return [Address(SEEDS[i % 5], i % 3, 10 * i, draft_stream(i, 1) if i % 4 == 3 else 0) for i in range(count)]


def columns(which: list[Address], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """seeds, samples, positions, streams"""
    seeds = torch.from_numpy(np.array([a.seed for a in which], dtype=np.uint64).view(np.int64)).to(device)
    numbers = zip(*((a.sample, a.position, a.stream) for a in which), strict=True)
    rest = [torch.tensor(column, dtype=torch.int32, device=device) for column in numbers]
    return seeds, *rest  # type: ignore[return-value]


def logits(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """As of a model: a few tokens well ahead; rows lie further apart than they are long."""
    torch.manual_seed(rows * vocab)
    values = torch.randn(rows, vocab + 5) * 2
    values[:, :9] += 8
    return values.to(device=device, dtype=dtype)[:, :vocab]


def check(scores: Tensor, splits: int) -> None:
    count = 2 * len(scores)
    rows = torch.arange(count, device=scores.device) // 2
    noisy = torch.arange(count, device=scores.device) % 5 != 1
    which = addresses(count)
    found = sample.gumbel_argmax(scores, rows, noisy, *columns(which, scores.device), splits=splits)
    twin = reference.gumbel_argmax(scores, rows, noisy, *columns(which, scores.device))
    assert found.dtype == torch.int32 and torch.equal(found, twin)
    host = scores.cpu()
    drawn = gumbel_max.gumbel_argmax(host, rows.tolist(), which)
    plain = gumbel_max.first_argmax(host[rows.cpu()])
    assert found.tolist() == [d if n else p for d, p, n in zip(drawn, plain, noisy.tolist(), strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 49152), (3, 8193), (7, 111)])
def test_the_kernel_draws_what_the_engine_draws(
    rows: int, vocab: int, splits: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(logits(rows, vocab, dtype, device), splits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 128256), (64, 49152), (256, 151936)])
def test_the_kernel_draws_what_the_engine_draws_at_full_size(
    rows: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> None:
    check(logits(rows, vocab, dtype, device), 0)


@pytest.mark.gpu
def test_every_noise_value_of_the_device_is_the_cpus(device: torch.device) -> None:
    bits = torch.arange(2**24, dtype=torch.int32)
    assert torch.equal(to_gumbel(bits.to(device)).cpu(), to_gumbel(bits))


def test_the_twins_noise_is_the_engines(device: torch.device) -> None:
    which = addresses(9)
    seeds, samples, positions, streams = zip(*((a.seed, a.sample, a.position, a.stream) for a in which), strict=True)
    expected = gumbel(seeds, samples, positions, vocab_size=1001, stream=streams)
    assert torch.equal(reference.gumbel_noise(*columns(which, device), 1001).cpu(), expected)


def test_flat_rows_are_won_by_noise_alone(device: torch.device) -> None:
    check(torch.zeros(7, 4099, device=device), 2)


def test_rows_without_an_answer_say_so_and_hurt_no_other(device: torch.device) -> None:
    scores = torch.randn(6, 2050, device=device)
    scores[0, 2049] = torch.nan
    scores[1, 3] = torch.inf
    scores[2] = -torch.inf
    scores[3, :1500] = -torch.inf
    scores[4, 1:] = -torch.inf
    for splits in (1, 3):
        for noisy in (True, False):
            flags = torch.full((6,), noisy, device=device)
            args = (scores, torch.arange(6, device=device), flags, *columns(addresses(6), device))
            found = sample.gumbel_argmax(*args, splits=splits).tolist()
            assert found[:3] == [-1] * 3 and found[3] >= 1500 and found[4] == 0 and found[5] >= 0
            assert found == reference.gumbel_argmax(*args).tolist()


def test_ties_go_to_the_lowest_id_across_tiles_and_parts(device: torch.device) -> None:
    scores = torch.zeros(1, 5000, device=device)
    scores[0, [1030, 1031, 2500, 4999]] = 3.0
    args = (torch.zeros(1, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.bool, device=device))
    for splits in (1, 2, 5):
        assert sample.gumbel_argmax(scores, *args, *columns(addresses(1), device), splits=splits).tolist() == [1030]


def test_nobody_asks(device: torch.device) -> None:
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    found = sample.gumbel_argmax(torch.zeros(2, 8, device=device), empty, empty.bool(), empty.long(), empty, empty, empty)
    assert found.shape == (0,)


def test_a_large_lead_cannot_be_lost_and_a_small_one_can(device: torch.device) -> None:
    """The bound that spares logarithms never spares the winner: scores that decide nothing, little and everything."""
    for scale in (1e-3, 1.0, 30.0, 1e6):
        torch.manual_seed(int(scale))
        check(torch.randn(3, 1500, device=device) * scale, 1)
