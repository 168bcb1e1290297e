"""The target law's kernels against their twins and against the engine's own truncation and penalties."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from engine.truncation import truncate

pytest.importorskip("triton")

from kernels import law
from kernels import reference_sampling as reference
from kernels import truncate as cut

ASKED = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (40, 1.0, 0.0),
    (0, 0.9, 0.0),
    (20, 0.8, 0.0),
    (0, 1.0, 0.1),
    (50, 0.95, 0.05),
    (0, 1e-9, 0.0),
]


def logits(rows: int, vocab: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """As of a model: a handful well ahead; rows lie further apart than they are long."""
    torch.manual_seed(vocab + rows)
    values = torch.randn(rows, vocab + 3) * 2
    values[:, 3:14] += 6
    return values.to(dtype).to(device)[:, :vocab]


def parameters(asked: list[tuple[int, float, float]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    k, p, m = zip(*asked, strict=True)
    return (
        torch.tensor(k, dtype=torch.int32, device=device),
        torch.tensor(p, dtype=torch.float64, device=device),
        torch.tensor(m, dtype=torch.float64, device=device),
    )


def check_truncation(scores: Tensor, asked: list[tuple[int, float, float]], splits: int) -> None:
    expected = scores.cpu().clone()
    for row, (k, p, m) in zip(expected, asked, strict=True):
        truncate(row[None], k, p, m)
    args = parameters(asked, scores.device)
    found = cut.truncate_(scores.clone(), *args, splits=splits).cpu()
    twin = reference.truncate_(scores.clone(), *args).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(twin, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("vocab", "splits"), [(111, 1), (8193, 1), (8193, 3)])
def test_what_is_kept_is_what_the_engine_keeps(vocab: int, splits: int, device: torch.device) -> None:
    check_truncation(logits(len(ASKED), vocab, device), ASKED, splits)


def test_a_large_vocabulary(device: torch.device) -> None:
    check_truncation(logits(1, 49152, device), [(100, 0.95, 0.0)], 1)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [49152, 128256, 151936])
def test_what_is_kept_is_what_the_engine_keeps_at_full_size(vocab: int, device: torch.device) -> None:
    check_truncation(logits(8 * len(ASKED), vocab, device), 8 * ASKED, 0)


def test_of_equal_scores_the_lower_ids_stay(device: torch.device) -> None:
    scores = logits(7, 1111, device, torch.bfloat16).float().mul(2).round() / 2 + 0.0
    scores[:, 5] = scores[:, 700] = -0.0  # equal to 0, whatever its bits say
    assert any(int((row == row.max()).sum()) > 1 for row in scores)
    check_truncation(
        scores, [(1, 1.0, 0.0), (3, 1.0, 0.0), (600, 1.0, 0.0), (0, 0.5, 0.0), (7, 0.5, 0.0), (0, 0.99, 0.0), (9, 1.0, 0.9)], 2
    )
    check_truncation(torch.zeros(3, 700, device=device), [(1, 1.0, 0.0), (0, 0.5, 0.0), (600, 0.5, 0.0)], 2)


def test_rows_that_hold_no_law_are_left_alone(device: torch.device) -> None:
    scores = logits(5, 600, device).clone()
    scores[0, 599], scores[1, 2], scores[2] = torch.nan, torch.inf, -torch.inf
    scores[3, 4:] = -torch.inf
    check_truncation(scores, [(3, 0.5, 0.1)] * 3 + [(9, 1.0, 0.0), (2, 1.0, 0.0)], 2)


def test_what_nobody_asks_for_is_not_looked_for(device: torch.device) -> None:
    scores = logits(2, 300, device)
    args = parameters([(0, 1.0, 0.2), (0, 1.0, 0.0)], device)
    found = cut.truncate_(scores.clone(), *args, use_k=False, use_p=False)
    assert torch.equal(found, reference.truncate_(scores.clone(), *args))
    assert torch.equal(found[1], scores[1])
    assert cut.truncate_(scores[:0], *parameters([(0, 1.0, 0.0)], device)).shape == (0, 300)


def test_a_vocabulary_beyond_a_million_is_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="1048576"):
        cut.truncate_(torch.zeros(1, 2**20 + 1, device=device), *parameters([(0, 1.0, 0.0)], device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 49152), (3, 8193), (7, 111)])
def test_masks_and_temperature(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    check_shape(rows, vocab, dtype, device)


@pytest.mark.gpu
def test_masks_and_temperature_at_full_size(device: torch.device) -> None:
    check_shape(256, 151936, torch.bfloat16, device)


def check_shape(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
    values = logits(rows, vocab, device, dtype)
    heat = torch.tensor([0.7, 0.0, 1.0, 1.3], device=device).repeat(rows)[:rows]
    allowed = torch.randint(-(2**31), 2**31, (2, -(-vocab // 32)), device=device).int()
    mask_row = torch.tensor([1, -1, 0], dtype=torch.int32, device=device).repeat(rows)[:rows]
    for masks in ((), (allowed, mask_row)):
        found, twin = law.shape_scores(values, heat, *masks), reference.shape_scores(values, heat, *masks)
        assert found.dtype == torch.float32 and torch.equal(found, twin)
    assert torch.equal(law.shape_scores(values, heat)[0].cpu(), values[0].cpu().float() / 0.7)  # as the engine divides
    assert torch.isneginf(law.shape_scores(values, heat, allowed, mask_row)[0]).any()


def test_edits(device: torch.device) -> None:
    scores = logits(3, 500, device).clone()
    entries = list(product(range(3), range(0, 500, 3)))
    rows, tokens = (torch.tensor(c, dtype=torch.int32, device=device) for c in zip(*entries, strict=True))
    count = len(entries)
    bias = torch.randn(count, device=device).masked_fill_(torch.arange(count, device=device) % 7 == 0, -torch.inf)
    counts = (torch.arange(count, device=device) % 5 - 1).float()
    penalties = [torch.tensor(p, device=device) for p in ([1.0, 1.3, 0.8], [0.0, 0.5, -0.2], [0.1, 0.0, 0.3])]
    args = (rows, tokens, bias, counts, *penalties)
    found, twin = law.edit_(scores.clone(), *args), reference.edit_(scores.clone(), *args)
    assert torch.equal(found, twin)
    untouched = torch.ones(500, dtype=torch.bool, device=device)
    untouched[::3] = False
    assert torch.equal(found[:, untouched], scores[:, untouched]) and not torch.equal(found, scores)
    assert torch.isneginf(found).any()


def test_a_penalty_is_what_the_request_asks_for(device: torch.device) -> None:
    """One seen token twice in the output, one in the prompt alone, one not at all: worked out by hand."""
    scores = torch.tensor([[2.0, -2.0, 2.0]], device=device)
    ids = torch.arange(3, dtype=torch.int32, device=device)
    counts = torch.tensor([2.0, 0.0, -1.0], device=device)
    penalties = (torch.tensor([p], device=device) for p in (2.0, 0.5, 0.25))
    law.edit_(scores, ids * 0, ids, torch.zeros(3, device=device), counts, *penalties)
    assert scores.tolist() == [[2.0 / 2 - 2 * 0.25 - 0.5, -4.0, 2.0]]
