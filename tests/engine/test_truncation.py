"""top_k, top_p and min_p keep exactly the sets they define, ties by lower id."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.truncation import SLICES, _truncate_sorted, truncate


def kept(scores: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero()[:, 0].tolist() for row in scores]


def defined(row: list[float], top_k: int, top_p: float, min_p: float) -> list[int]:
    """The sets as one would define them; None of the tests' numbers lies within rounding of a boundary."""
    order = sorted(range(len(row)), key=lambda token: (-row[token], token))
    if top_k:
        order = order[:top_k]
    odds = np.exp(np.array([row[token] for token in order]) - row[order[0]])
    if top_p < 1:
        size = int((odds.cumsum() / odds.sum() < top_p).sum()) + 1
        order, odds = order[:size], odds[:size]
    return sorted(token for token, o in zip(order, odds, strict=True) if o >= min_p)


@settings(max_examples=80, deadline=None)
@given(
    vocab_size=st.sampled_from([1, 2, 10, 300, 5000]),
    top_k=st.sampled_from([0, 1, 2, 7, 256, 10_000]),
    top_p=st.sampled_from([1.0, 0.99873, 0.90123, 0.5117, 0.0013]),
    min_p=st.sampled_from([0.0, 0.0517, 0.4931]),
    levels=st.sampled_from([3, 40, 0]),
    seed=st.integers(0, 10_000),
)
def test_the_sets_are_those_of_the_definition(
    vocab_size: int, top_k: int, top_p: float, min_p: float, levels: int, seed: int
) -> None:
    scores = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(seed)) * 2
    if levels:  # many ties
        scores = (scores * levels / 4).round() * 4 / levels
    original = scores.clone()
    truncate(scores, top_k, top_p, min_p)
    expected = [defined(row, top_k, top_p, min_p) for row in original.double().tolist()]
    assert kept(scores) == expected
    assert torch.equal(scores[scores.isfinite()], original[scores.isfinite()])
    by_sort = original.clone()
    _truncate_sorted(by_sort, top_k, top_p, min_p)
    assert kept(by_sort) == expected
    alone = original[1:2].clone()
    truncate(alone, top_k, top_p, min_p)
    assert kept(alone) == expected[1:2]


@pytest.mark.parametrize("apply", [truncate, _truncate_sorted])
def test_mass_that_lies_deep_is_found(apply: object) -> None:
    # A flat row: no slice holds the mass, nor may a tie be cut anywhere but behind the lowest ids.
    scores = torch.zeros(1, SLICES[-1] * 3)
    apply(scores, 0, 0.75, 0.0)  # type: ignore[operator]
    assert kept(scores) == [list(range(int(SLICES[-1] * 3 * 0.75)))]


@pytest.mark.parametrize("apply", [truncate, _truncate_sorted])
def test_unusable_rows_are_left_alone(apply: object) -> None:
    scores = torch.tensor([[1.0, torch.nan, 0.0], [-torch.inf] * 3, [0.0, 1.0, -torch.inf]])
    before = scores.clone()
    apply(scores, 2, 0.9, 0.1)  # type: ignore[operator]
    assert torch.equal(scores[:2].nan_to_num(7.0), before[:2].nan_to_num(7.0))
    assert kept(scores)[2] == [0, 1]


@pytest.mark.parametrize("apply", [truncate, _truncate_sorted])
def test_masked_tokens_stay_masked(apply: object) -> None:
    scores = torch.tensor([[-torch.inf, 2.0, -torch.inf, 1.0]])
    apply(scores, 3, 1.0, 0.0)  # type: ignore[operator]
    assert kept(scores) == [[1, 3]]
