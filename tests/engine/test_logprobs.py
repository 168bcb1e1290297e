"""Logprobs are those of the raw logits, ranks count what is likelier, and ties go to the lower id."""

from __future__ import annotations

import math

import pytest
import torch

from engine.logprobs import token_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_log_softmax(dtype: torch.dtype) -> None:
    logits = (torch.randn(5, 1003, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)
    chosen = [3, 1002, 0, 77, 500]
    expected = logits.double().log_softmax(-1)
    for entry, row, token in zip(token_logprobs(logits, chosen, 7), expected, chosen, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-5)
        assert entry.rank == 1 + int((row > row[token]).sum())
        order = sorted(range(1003), key=lambda t: (-row[t].item(), t))[:7]
        assert [token for token, _ in entry.top] == order
        assert [value for _, value in entry.top] == pytest.approx(row[order].tolist(), abs=1e-5)


def test_ties_and_small_vocabularies() -> None:
    (entry,) = token_logprobs(torch.tensor([[1.0, 2.0, 2.0, 1.0]]), [2], 3)
    assert entry.rank == 1
    assert [token for token, _ in entry.top] == [1, 2, 0]
    assert dict(token_logprobs(torch.zeros(1, 2), [1], 20)[0].top) == pytest.approx({0: math.log(0.5), 1: math.log(0.5)})
    assert token_logprobs(torch.zeros(1, 2), [1], 0)[0].top == []
    assert token_logprobs(torch.zeros(0, 2), [], 5) == []


def test_a_masked_token_has_no_chance_and_spoils_nothing() -> None:
    (entry,) = token_logprobs(torch.tensor([[0.0, -math.inf, 0.0]]), [0], 3)
    assert entry.logprob == pytest.approx(math.log(0.5))
    assert entry.top[2] == (1, -math.inf)
