"""The pruned draw is the full draw: noise for the tokens that can win gives what noise for every token gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.gumbel_max import UNUSABLE, Address, _Draw, first_argmax, gumbel_argmax
from engine.noise import gumbel


def full(scores: torch.Tensor, addresses: list[Address]) -> list[int]:
    seeds, samples, positions = zip(*((a.seed, a.sample, a.position) for a in addresses), strict=True)
    return (scores.float() + gumbel(seeds, samples, positions, vocab_size=scores.shape[1])).argmax(-1).tolist()


@settings(max_examples=150, deadline=None)
@given(
    vocab_size=st.sampled_from([1, 2, 7, 64, 1001]),
    scale=st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0, 1e5, 1e9]),
    shift=st.sampled_from([0.0, -300.0, 1.6e7]),  # at 1.6e7 float32 counts in ones: sums tie by rounding
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    masked=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
)
def test_pruning_changes_nothing(
    vocab_size: int, scale: float, shift: float, dtype: torch.dtype, masked: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed % 1000)
    scores = (torch.randn(5, vocab_size, generator=generator) * scale + shift).to(dtype)
    if masked:
        scores[:, torch.rand(vocab_size, generator=generator) < 0.5] = -torch.inf
        scores[:, 0] = 0.0
    addresses = [Address((seed + i) % 2**64, i % 3, seed % 1000 + i) for i in range(5)]
    expected = full(scores, addresses)
    assert gumbel_argmax(scores, range(5), addresses) == expected
    for i in range(5):
        assert gumbel_argmax(scores, [i], [addresses[i]]) == [expected[i]]
    assert gumbel_argmax(scores, [3, 1, 3], [addresses[3], addresses[1], addresses[0]])[:2] == [expected[3], expected[1]]


def test_one_row_of_many_tokens_equals_the_full_draw() -> None:
    # Large enough that words are computed in several chunks and that most tokens are pruned, or none.
    scores = torch.randn(6, 60_001, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.0], [0.1], [1], [3], [5], [20]]
    )
    addresses = [Address(99, i, 1000 + i) for i in range(6)]
    assert gumbel_argmax(scores, range(6), addresses) == full(scores, addresses)


def test_unusable_rows_are_reported_and_harm_no_other() -> None:
    scores = torch.zeros(6, 50)
    scores[0, 7] = torch.nan
    scores[1] = -torch.inf
    scores[2, 3] = torch.inf
    scores[3] = torch.nan
    scores[4, 1:] = -torch.inf
    addresses = [Address(1, 0, i) for i in range(6)]
    found = gumbel_argmax(scores, range(6), addresses)
    assert found[:5] == [UNUSABLE, UNUSABLE, UNUSABLE, UNUSABLE, 0]
    assert found[5:] == full(scores[5:], addresses[5:])
    assert first_argmax(scores) == [UNUSABLE, UNUSABLE, UNUSABLE, UNUSABLE, 0, 0]
    assert gumbel_argmax(scores, [], []) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 5, 16, 1001, 40_000])
def test_the_lowest_id_wins_a_tie(dtype: torch.dtype, vocab_size: int) -> None:
    scores = torch.randint(0, 3, (19, vocab_size), generator=torch.Generator().manual_seed(vocab_size)).to(dtype)
    expected = [row.index(max(row)) for row in scores.tolist()]
    assert first_argmax(scores) == expected
    assert first_argmax(scores[4:5]) == expected[4:5]


@pytest.mark.gpu
def test_a_gpu_draws_the_same_tokens() -> None:
    scores = torch.randn(7, 5003, generator=torch.Generator().manual_seed(0)) * 3
    scores[5, 2] = torch.nan
    addresses = [Address(2**64 - 1 - i, i, i) for i in range(7)]
    assert gumbel_argmax(scores.cuda(), range(7), addresses) == gumbel_argmax(scores, range(7), addresses)
    assert first_argmax(scores.cuda()) == first_argmax(scores)


@pytest.mark.parametrize("peak", [0.0, -7.25, 31.0])
def test_the_largest_noises_reach_what_they_achieve(peak: float) -> None:
    """A token whose own noise set the mark is among those that are looked at, up to the largest noise there is."""
    address = Address(1, 0, 0)
    for missing in [*range(1, 200), 1000, 2**20, 2**24 - 1, 2**24]:
        bits = np.array([5, 2**24 - missing], dtype=np.uint32)
        noise = -np.log(-np.log((bits[1] + 0.5) * 2.0**-24))
        slack = 1e-2 + 1e-6 * abs(peak)
        values = np.array([peak - 40, peak], dtype=np.float32)
        draw = _Draw(0, address, np.array([3, 8]), values, peak + float(noise) - slack)
        assert draw.winner(bits) == 8
