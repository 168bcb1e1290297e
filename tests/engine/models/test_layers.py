"""The decoder's parts beyond what their twins define."""

from __future__ import annotations

import torch

from engine.models.layers import Head, Linear


def test_ties_of_bfloat16_logits_are_settled_in_float32() -> None:
    """Two tokens whose products round to the same bf16 number: the larger product wins, whatever its id."""
    torch.manual_seed(0)
    weight = torch.randn(50, 32).bfloat16()
    x = torch.randn(64, 32).bfloat16()
    exact = x.float() @ weight.float().T
    for row in range(64):  # plant a rival just below the winner, under a lower id
        best = int(exact[row].argmax())
        if best > 0:
            weight[best - 1] = weight[best]
            weight[best - 1, 0] -= weight[best, 0] * 0.004
            break
    exact = x.float() @ weight.float().T
    linear = Linear(weight)
    rounded = linear(x).float()
    ties = (rounded == rounded.amax(-1, keepdim=True)).sum(-1)
    assert (ties > 1).any(), "the case this test is about does not occur"
    plain, settled = Head(linear, None)(x), Head(linear, weight)(x)
    assert settled.dtype == torch.float32
    assert torch.equal(settled.argmax(-1)[ties > 1], exact.argmax(-1)[ties > 1])
    assert torch.equal(settled[ties == 1], plain[ties == 1])


def test_a_row_of_nan_stays_a_row_of_nan() -> None:
    weight = torch.randn(10, 8).bfloat16()
    x = torch.full((1, 8), float("nan"), dtype=torch.bfloat16)
    assert torch.isnan(Head(Linear(weight), weight)(x)).all()
