"""The allocator is the exact optimum: it equals brute force, with affine and staircase costs, drafting and limits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.policies import allocation
from engine.policies.allocation import allocate, decoding_rate, select

Double = NDArray[np.float64]


def affine(rng: np.random.Generator, size: int) -> Double:
    return rng.uniform(0.5, 4) + rng.uniform(0.01, 0.6) * np.arange(size)


def staircase(rng: np.random.Generator, size: int) -> Double:
    tier = int(rng.integers(2, 6))
    jumps = rng.uniform(0.0, 1.5, size=size // tier + 2).cumsum()
    return rng.uniform(0.5, 3) + jumps[np.arange(size) // tier]


COSTS = {"affine": affine, "staircase": staircase}


def random_survival(rng: np.random.Generator, count: int, longest: int) -> Double:
    return np.cumprod(rng.uniform(0.1, 1.0, size=(count, longest)) ** rng.uniform(0.2, 2.0), axis=1)


def brute_force(
    survival: Double, verify: Double, draft: Double, caps: NDArray[np.int64], limit: float
) -> tuple[float, tuple[int, ...]]:
    count, longest = survival.shape
    best, found = -1.0, (0,) * count
    for lengths in product(*(range(min(longest, cap) + 1) for cap in caps)):
        total, depth = sum(lengths), max(lengths, default=0)
        seconds = verify[total] + (draft[depth] if draft.ndim == 1 else draft[depth, total])
        if total and seconds > limit:
            continue
        tokens = count + sum(survival[b, :length].sum() for b, length in enumerate(lengths))
        if tokens / seconds > best * (1 + 1e-12):
            best, found = tokens / seconds, lengths
    return best, found


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("drafting", ["free", "by depth", "by depth and tokens"])
def test_it_equals_brute_force(cost: str, drafting: str) -> None:
    rng = np.random.default_rng(sum(map(ord, cost + drafting)))
    for case in range(100):
        count, longest = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        survival = random_survival(rng, count, longest)
        size = count * longest + 1
        verify = COSTS[cost](rng, size)
        draft = np.zeros(longest + 1) if drafting == "free" else rng.uniform(0, 0.5) * np.arange(longest + 1)
        if drafting == "by depth and tokens":
            draft = draft[:, None] + rng.uniform(0, 0.2) * np.arange(size)
        caps = rng.integers(0, longest + 1, size=count) if case % 3 == 0 else np.full(count, longest)
        limit = float(verify[0] * rng.uniform(0.9, 3)) if case % 4 == 0 else np.inf
        found = allocate(survival, verify, draft, caps, limit)
        expected, _ = brute_force(survival, verify, draft, caps, limit)
        assert found.tokens / found.seconds == pytest.approx(expected, rel=1e-12)
        # What it says is what its lengths give.
        total, depth = int(found.nodes.sum()), int(found.nodes.max(initial=0))
        seconds = verify[total] + (draft[depth] if draft.ndim == 1 else draft[depth, total])
        tokens = count + sum(survival[b, :length].sum() for b, length in enumerate(found.nodes))
        assert found.depth == depth and (found.nodes <= caps).all()
        assert tokens == pytest.approx(found.tokens) and seconds == pytest.approx(found.seconds)


def test_stopping_at_the_first_decrease_would_miss_it() -> None:
    survival = np.full((1, 8), 0.9) ** np.arange(1, 9)
    verify = 1.0 + 0.9 * (np.arange(9) > 0)  # one node costs almost a step, the next seven nothing
    found = allocate(survival, verify)
    assert found.nodes.tolist() == [8] and found.speedup > 1


def test_a_tier_is_filled_to_its_edge() -> None:
    survival = np.array([[0.5, 0.01, 0.009, 0.008, 0.007]])
    verify = np.array([1.0, 1.2, 1.2, 1.2, 9.0, 9.0])
    assert allocate(survival, verify).nodes.tolist() == [3]


def test_off_when_nothing_pays_and_when_there_is_nobody() -> None:
    assert allocate(np.full((4, 3), 0.1), 1.0 + np.arange(13.0)).nodes.tolist() == [0, 0, 0, 0]
    assert allocate(np.zeros((0, 5)), np.ones(1)).nodes.tolist() == []
    assert allocate(np.zeros((2, 0)), np.ones(1)).nodes.tolist() == [0, 0]


def test_the_limit_holds_even_where_plain_decoding_breaks_it() -> None:
    survival = np.full((2, 4), 0.95)
    assert allocate(survival, 1.0 + 0.1 * np.arange(9), limit=1.35).nodes.sum() == 3
    assert allocate(survival, 1.0 + 0.1 * np.arange(9), limit=0.5).nodes.sum() == 0


def random_forest(rng: np.random.Generator, roots: int, nodes: int) -> tuple[list[int], Double]:
    """Parents (-1: a root) and survival; parents come first."""
    parent: list[int] = []
    survival: list[float] = []
    for _ in range(nodes):
        up = int(rng.integers(-roots, len(parent))) if parent else -1
        parent.append(max(up, -1))
        estimate = float(rng.choice([1.0, 0.5, rng.uniform(0.05, 1.0)]))  # ties too
        survival.append(estimate * (survival[up] if up >= 0 else 1.0))
    return parent, np.array(survival)


@pytest.mark.parametrize("few", [allocation.FEW, -1], ids=["loop", "arrays"])
@pytest.mark.parametrize("cost", COSTS)
def test_the_selection_of_tree_nodes_equals_brute_force(cost: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "FEW", few)
    rng = np.random.default_rng(len(cost))
    for case in range(150):
        roots, nodes = int(rng.integers(1, 4)), int(rng.integers(0, 9))
        parent, survival = random_forest(rng, roots, nodes)
        verify = COSTS[cost](rng, nodes + 1)
        limit = float(verify[0] * rng.uniform(0.9, 2)) if case % 3 == 0 else np.inf
        best = roots / verify[0]
        for kept in product([False, True], repeat=nodes):
            if any(k and parent[i] >= 0 and not kept[parent[i]] for i, k in enumerate(kept)):
                continue
            total = sum(kept)
            if total and verify[total] <= limit:
                best = max(best, (roots + survival[list(kept)].sum()) / verify[total])
        found = select(survival, verify, roots, limit)
        assert found.tokens / found.seconds == pytest.approx(best, rel=1e-12)
        assert sum(found.kept) == found.count and found.seconds == verify[found.count]
        for node in np.flatnonzero(found.kept):
            assert parent[node] < 0 or found.kept[parent[node]], "a node was kept above which one was dropped"


def test_a_margin_is_asked_of_drafts_but_not_of_more_drafts() -> None:
    survival, verify = np.array([0.5, 0.2]), np.array([1.0, 1.47, 1.6])
    assert select(survival, verify, roots=1).count == 2
    assert select(survival, verify, roots=1, margin=1.05).count == 2
    assert select(survival, verify, roots=1, margin=1.07).count == 0


def test_the_limit_says_so() -> None:
    survival, verify = np.array([0.9, 0.8, 0.7]), 1.0 + 0.1 * np.arange(4)
    assert select(survival, verify, 1).limited is False
    found = select(survival, verify, 1, limit=1.25)
    assert found.count == 2 and found.limited


def test_a_rate_of_its_own_gives_the_same_choice_as_the_quotient() -> None:
    """Dinkelbach: the best quotient is the rate at which the best difference is nothing."""
    rng = np.random.default_rng(11)
    for _ in range(100):
        roots, nodes = int(rng.integers(1, 5)), int(rng.integers(0, 30))
        survival, verify = random_forest(rng, roots, nodes)[1], staircase(rng, nodes + 1)
        rate = decoding_rate(survival, verify, roots)
        assert select(survival, verify, roots, rate=rate).count == select(survival, verify, roots).count


def test_a_load_that_only_takes_time_makes_no_guess_cheaper() -> None:
    survival, alone = np.array([0.9, 0.5, 0.2, 0.1]), 1.0 + 0.4 * np.arange(5)
    rate = decoding_rate(survival, alone, 1)
    assert select(survival, alone, 1).count == select(survival, alone + 50.0, 1, rate=rate).count == 1
    assert select(survival, alone + 50.0, 1).count == 4  # what the quotient would do
    chain = np.cumprod(np.full((1, 4), 0.6), axis=1)
    rate = 1 / float(alone[0])
    assert allocate(chain, alone + 50.0, rate=rate).nodes.tolist() == [1] and allocate(chain, alone + 50.0).nodes.tolist() == [4]
