"""The cost model: positive, monotone, a staircase where one was measured; it learns, and no single step sways it."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.cost import CostModel, CostTables, guess, non_decreasing
from engine.surface import MEASURED_BOUNDS, SurfaceTable
from tests.fakes import fake_info

TOKENS = [1.0, 4.0, 16.0, 17.0, 32.0, 64.0]
CONTEXTS = [0.0, 512.0]


def stairs(tokens: float, context: float) -> float:
    """Flat to 16 tokens, then a step, then a slope."""
    return 0.010 + (0.006 if tokens > 16 else 0.0) + max(tokens - 17, 0) * 4e-4 + tokens * context * 1e-7


def tables(**changes: Any) -> CostTables:
    seconds = [[stairs(t, c) for c in CONTEXTS] for t in TOKENS]
    surface = msgspec.structs.replace(SurfaceTable(xs=TOKENS, ys=CONTEXTS, seconds=seconds), **changes)
    return CostTables(verify=surface, per_sequence=1e-4, per_sequence_context=1e-7)


def test_it_gives_back_what_was_measured() -> None:
    cost = CostModel(tables())
    for tokens in (1, 4, 16, 17, 32, 64):
        for context in (0, 512):
            assert cost.verify_seconds(tokens, context, 1) == pytest.approx(stairs(tokens, context))
    assert cost.verify_seconds(16, 16 * 256, 16) == pytest.approx(stairs(16, 256) + 15 * (1e-4 + 256e-7))


def test_between_and_beyond_the_points() -> None:
    cost = CostModel(tables())
    assert cost.verify_seconds(10, 0, 1) == pytest.approx(0.010)
    assert cost.verify_seconds(48, 0, 1) == pytest.approx(stairs(48, 0))
    assert cost.verify_seconds(100, 0, 1) == pytest.approx(stairs(100, 0))
    assert cost.verify_seconds(1, 5120, 1) == pytest.approx(stairs(1, 5120))
    assert cost.verify_seconds(0, 0, 0) == pytest.approx(0.010)


def test_many_token_counts_at_once() -> None:
    cost = CostModel(tables())
    counts = np.arange(1, 200)
    found = cost.verify_seconds(counts, 300, 3)
    assert found.shape == counts.shape
    assert found == pytest.approx([cost.verify_seconds(int(n), 300, 3) for n in counts])
    assert (np.diff(found) >= 0).all()


def test_a_padded_step_costs_its_tier() -> None:
    cost = CostModel(tables(), tier=lambda tokens: -(-tokens // 8) * 8)
    counts = np.array([1, 8, 9, 17, 25])
    assert cost.verify_seconds(counts, 0, 1) == pytest.approx(
        CostModel(tables()).verify_seconds(np.array([8, 8, 16, 24, 32]), 0, 1)
    )
    assert cost.verify_seconds(1000, 0, 1) == pytest.approx(stairs(1000, 0))  # beyond what it has looked up before


@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(0, 4000), st.integers(1, 32), st.floats(1e-5, 10)), max_size=40),
    st.booleans(),
)
def test_whatever_it_sees_it_stays_positive_and_monotone(seen: list[tuple[int, int, int, float]], measured: bool) -> None:
    cost = CostModel(tables(measured=measured))
    for tokens, context, sequences, seconds in seen:
        cost.observe(tokens, context, sequences, seconds)
    for context in (0, 100, 3000):
        found = cost.verify_seconds(np.arange(1, 400), context, 2)
        assert (found > 0).all() and np.isfinite(found).all() and (np.diff(found) >= 0).all()


def test_it_learns_where_it_was_wrong() -> None:
    """At 32 tokens the machine takes 1.3 times as long as the profile says, elsewhere it is right."""
    cost = CostModel(tables())
    rng = random.Random(1)
    for _ in range(2000):
        tokens = rng.choice([1, 4, 16, 32])
        cost.observe(tokens, 0, 1, stairs(tokens, 0) * (1.3 if tokens == 32 else 1.0) * rng.lognormvariate(0, 0.05))
    assert cost.verify_seconds(32, 0, 1) == pytest.approx(1.3 * stairs(32, 0), rel=0.06)
    assert cost.verify_seconds(4, 0, 1) == pytest.approx(stairs(4, 0), rel=0.06)
    assert cost.error < 0.1


def test_a_machine_that_gets_faster_leaves_no_stairs_around_the_size_that_is_seen() -> None:
    cost = CostModel(tables())
    sizes = np.array([4, 8, 9, 16, 24])
    before = cost.verify_seconds(sizes, 0, 1)
    for speed in (1.3, 0.9, 1.2, 1.0, 0.85):
        for _ in range(60):
            cost.observe(8, 0, 1, stairs(8, 0) * speed)
        after = cost.verify_seconds(sizes, 0, 1)
        assert after[1] == pytest.approx(speed * before[1], rel=0.05)
        assert after / after[1] == pytest.approx(before / before[1], rel=0.04)


def test_a_step_that_was_put_aside_sways_nothing() -> None:
    cost = CostModel(tables())
    before = cost.verify_seconds(16, 0, 1)
    cost.observe(16, 0, 1, 5.0)
    assert cost.verify_seconds(16, 0, 1) < 1.03 * before
    rng = random.Random(2)
    for _ in range(1000):  # one step in twenty takes 300 ms
        cost.observe(16, 0, 1, 0.3 if rng.random() < 0.05 else before)
    assert cost.verify_seconds(16, 0, 1) == pytest.approx(before, rel=0.05)


def test_corrections_are_bounded_where_it_was_measured() -> None:
    """A table that is off everywhere is drift; between its points nothing turns over."""
    cost = CostModel(tables())
    for _ in range(3000):
        cost.observe(4, 0, 1, stairs(4, 0) * 8)
    assert cost.verify_seconds(4, 0, 1) == pytest.approx(8 * stairs(4, 0), rel=0.05)
    corrections = np.array(cost.tables().verify.corrections)
    assert (corrections >= MEASURED_BOUNDS[0] - 1e-9).all() and (corrections <= MEASURED_BOUNDS[1] + 1e-9).all()
    assert cost.verify_seconds(64, 0, 1) > 4 * stairs(64, 0)  # never seen since the machine got slow, and slow all the same


def test_nonsense_is_dropped() -> None:
    cost = CostModel(tables())
    before = cost.tables()
    for seconds in (0.0, -1.0, math.nan, math.inf):
        cost.observe(4, 0, 1, seconds)
        cost.observe_draft("x", 1, 4, seconds)
    cost.observe(0, 0, 0, 1.0)
    assert cost.tables().verify == before.verify


def test_a_guess_is_soon_mended() -> None:
    """From a guess without any profile: a hundred ordinary steps and the costs are right to a tenth."""
    info = fake_info(device="cpu", weight_bytes=270_000_000, kv_bytes=256 << 20, num_blocks=700, block_size=16)
    cost = CostModel(guess(info))
    assert not cost.measured
    rng = random.Random(3)
    for i in range(100):
        tokens = rng.choice([1, 2, 4, 8, 12])
        seconds = 3.0 if i == 0 else stairs(tokens, 200) * rng.lognormvariate(0, 0.03)  # the very first step compiles kernels
        cost.observe(tokens, 200, 1, seconds)
    for tokens in (1, 4, 12):
        assert cost.verify_seconds(tokens, 200, 1) == pytest.approx(stairs(tokens, 200), rel=0.1)


def test_drafting_is_learned_for_each_drafter() -> None:
    cost = CostModel(tables())
    assert cost.draft_seconds("ngram", 0, 4) == cost.draft_seconds("ngram", 3, 0) == 0.0
    assert 0 < cost.draft_seconds("ngram", 1, 4) < 1e-3
    other = cost.draft_seconds("ngram", 8, 4)
    rng = random.Random(4)
    for _ in range(300):
        n, depth = rng.choice([1, 2, 4, 8]), rng.choice([1, 4, 8])
        cost.observe_draft("model", n, depth, depth * (0.002 + 0.0001 * n) * rng.lognormvariate(0, 0.05))
    for n, depth in ((1, 1), (1, 4), (8, 4)):
        assert cost.draft_seconds("model", n, depth) == pytest.approx(depth * (0.002 + 0.0001 * n), rel=0.25)
    assert cost.draft_seconds("ngram", 8, 4) == other


def test_what_was_learned_is_kept() -> None:
    cost = CostModel(tables())
    for _ in range(200):
        cost.observe(16, 0, 1, 0.013)
        cost.observe_draft("model", 2, 4, 0.004)
    kept = msgspec.json.decode(msgspec.json.encode(cost.tables()), type=CostTables)
    again = CostModel(kept)
    for tokens in (1, 16, 40):
        assert again.verify_seconds(tokens, 100, 2) == pytest.approx(cost.verify_seconds(tokens, 100, 2))
    assert again.draft_seconds("model", 3, 5) == pytest.approx(cost.draft_seconds("model", 3, 5))


@pytest.mark.parametrize(
    "changes",
    [
        {"xs": [1.0, 4.0, 4.0, 17.0, 32.0, 64.0]},
        {"xs": TOKENS[:-1]},
        {"seconds": [[0.0, 1.0]] * 6},
        {"seconds": [[math.nan, 1.0]] * 6},
        {"corrections": [[1.0, 1.0]]},
        {"corrections": [[-1.0, 1.0]] * 6},
        {"drift": 0.0},
    ],
    ids=str,
)
def test_tables_that_cannot_be_used_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        CostModel(tables(**changes))


@given(st.lists(st.floats(0.001, 10), min_size=1, max_size=30))
def test_non_decreasing(values: list[float]) -> None:
    fitted = non_decreasing(values)
    assert len(fitted) == len(values) and (np.diff(fitted) >= -1e-9).all()
    assert sum(fitted) == pytest.approx(sum(values))
    if (np.diff(values) >= 0).all():
        assert fitted == pytest.approx(values)


def test_a_drafter_with_a_model_costs_a_forward_per_depth() -> None:
    cost = CostModel(tables())
    cost.expect_depth("model", 0.02)
    assert [cost.draft_seconds("model", 1, depth) for depth in (1, 2, 8)] == pytest.approx([0.02, 0.04, 0.16])
    assert 0.04 < cost.draft_seconds("model", 16, 2) < 16 * 0.04
    for _ in range(200):
        cost.observe_draft("model", 1, 4, 0.1)
    learned = cost.draft_seconds("model", 1, 4)
    assert learned == pytest.approx(0.1, rel=0.05)
    kept = CostModel(cost.tables())
    kept.expect_depth("model", 0.021)
    assert kept.draft_seconds("model", 1, 4) == pytest.approx(learned), "what was learned agrees with the new timing"
    kept.expect_depth("model", 0.2)
    assert kept.draft_seconds("model", 1, 4) == pytest.approx(0.8), "another model: nothing of it holds"
