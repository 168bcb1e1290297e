"""The goodput policy in a world whose odds and costs are known: never slower than off or any fixed length, never off for ever."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from engine.policies.goodput import GoodputPolicy
from engine.protocols import Load, Policy
from engine.registry import make_policy
from engine.sequence import Sequence
from engine.tree import DraftForest
from tests.engine.policies.world import ChainDrafter, FormulaCost, Odds, World, affine_cost

CHEAP = 0.00001  # seconds that a look-up takes


def even(odds: float) -> Odds:
    return lambda seq, depth: odds


def mixed(seq: Sequence, depth: int) -> float:
    """A quarter of the sequences copy, the others write something new."""
    return 0.93 if seq.seq_id % 4 == 0 else 0.25


def staircase(tokens: np.ndarray) -> np.ndarray:
    return 0.004 + 0.0015 * np.ceil(tokens / 8)


def saturated(tokens: np.ndarray) -> np.ndarray:
    """Memory bound up to 16 tokens, compute bound from there."""
    return 0.005 + 0.0003 * np.maximum(tokens - 16, 0)


COSTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "affine": lambda n: 0.005 + 0.0004 * n,
    "staircase": staircase,
    "saturated": saturated,
    "dear": lambda n: 0.001 + 0.002 * n,
}


def world(
    odds: Odds, policy: Policy | str = "goodput", cost: str = "affine", count: int = 1, seed: int = 0, **options: object
) -> World:
    formula = FormulaCost(COSTS[cost], {"d": lambda n, depth: CHEAP * n})
    if isinstance(policy, str):
        policy = make_policy(policy, cost=formula, **options)
    return World(policy, formula, [ChainDrafter("d", odds, seed)], count)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("count", [1, 4, 32])
@pytest.mark.parametrize("odds", [mixed, even(0.0), even(0.6), even(0.95)], ids=["mixed", "never", "middling", "nearly always"])
def test_it_is_as_good_as_off_and_every_fixed_length(odds: Odds, count: int, cost: str) -> None:
    steps = 800 // count + 120
    best = max(
        [world(odds, "off", cost, count).run(50).goodput]
        + [world(odds, "fixed", cost, count, budget=k).run(steps).goodput for k in (1, 2, 4, 8, 16)]
    )
    found = world(odds, "goodput", cost, count)
    found.run(40).reset_counts()
    assert found.run(steps).goodput >= 0.97 * best


def test_on_mixed_traffic_it_beats_every_fixed_length() -> None:
    fixed = [world(mixed, "fixed", "affine", 8, budget=k).run(150).goodput for k in (0, 1, 2, 3, 4, 6, 8, 16)]
    assert world(mixed, "goodput", "affine", 8).run(400).goodput > 1.08 * max(fixed)


@pytest.mark.parametrize("count", [1, 16])
def test_drafts_that_never_stand_are_hardly_shown_but_not_forgotten(count: int) -> None:
    drafter = ChainDrafter("d", even(0.0))
    formula = FormulaCost(COSTS["affine"], {"d": lambda n, depth: CHEAP * n})
    found = World(GoodputPolicy(formula), formula, [drafter], count).run(200)
    found.reset_counts()
    before = drafter.asked
    found.run(2000)
    assert found.shown < 0.02 * found.steps
    assert drafter.asked - before > found.steps / 5  # and the committed tokens judge what was drafted
    off = world(even(0.0), "off", "affine", count).run(100)
    assert found.goodput > 0.985 * off.goodput


@pytest.mark.parametrize("count", [1, 16])
def test_off_is_not_for_ever(count: int) -> None:
    drafter = ChainDrafter("d", even(0.0))
    cost = affine_cost(0.005, 0.0004, d=lambda n, depth: CHEAP * n)
    found = World(GoodputPolicy(cost), cost, [drafter], count).run(1500)
    drafter.odds = even(0.95)
    found.run(250).reset_counts()
    found.run(200)
    assert found.tokens / found.steps / count > 4


def test_a_budget_grows_with_what_is_used_and_shrinks_with_what_is_not() -> None:
    found = world(even(1.0), "goodput", "saturated", max_budget=24)
    assert found.policy.budgets(found.seqs, Load(0, 10, 16)) == [16]
    found.run(40)
    assert found.policy.budgets(found.seqs, Load(0, 10, 16)) == [24]
    found = world(even(0.3), "goodput", "affine").run(60)
    assert found.policy.budgets(found.seqs, Load(0, 10, 16))[0] <= 6


def test_a_tier_is_filled() -> None:
    found = world(even(0.5), "goodput", "staircase").run(60)
    assert found.choice is not None
    assert (found.choice.forest.num_nodes - 1) % 8 == 7 or found.choice.forest.num_nodes <= 8


@pytest.mark.parametrize("count", [1, 8])
def test_no_draft_breaks_the_limit_on_a_steps_time(count: int) -> None:
    limit_ms = 1000 * (0.005 + 0.0004 * (count + 3.5 * count)) + 1000 * CHEAP * count
    found = world(even(0.97), "goodput", "affine", count, max_itl_ms=limit_ms)
    for _ in range(60):
        found.step()
        assert found.choice is not None and found.choice.seconds <= limit_ms / 1000 + 1e-9
    assert found.choice.forest.num_drafts == int(3.5 * count) and "itl" in found.choice.reasons


def test_where_plain_decoding_breaks_the_limit_already_nothing_is_drafted() -> None:
    found = world(even(0.97), "goodput", "affine", 4, max_itl_ms=1.0).run(100)
    assert found.shown == 0


def test_prompt_chunks_count_as_load() -> None:
    """The machine computes at no cost up to 16 tokens: a prompt chunk takes their place."""
    free = world(even(0.6), "goodput", "saturated").run(100)
    loaded = world(even(0.6), "goodput", "saturated", seed=0)
    loaded.run(100)
    loaded.reset_counts()
    free.reset_counts()
    free.run(100)
    loaded.run(100, prefill=16)
    assert loaded.choice is not None and free.shown > 2 * loaded.shown


def test_acceptance_does_not_depend_on_the_batch() -> None:
    rates = []
    for count in (1, 8, 32):
        found = world(even(0.8), "goodput", "staircase", count, max_budget=1).run(1500 // count + 30)
        assert found.shown
        rates.append(found.accepted / found.shown)
    assert max(rates) - min(rates) < 0.06


def test_a_spike_and_a_drain_leave_acceptance_as_it_was() -> None:
    found = world(even(0.8), "goodput", "saturated", 2).run(300)
    found.reset_counts()
    found.run(600)
    before, rate = found.tokens / found.steps, found.accepted / found.shown
    first = found.seqs
    found.seqs = first + [World.sequence(100 + i) for i in range(62)]
    found.run(150)
    assert found.choice is not None and found.choice.forest.num_drafts < 62, "the spike leaves no room"
    for seq in found.seqs[2:]:
        found.policy.forget(seq.seq_id)
    found.seqs = first
    found.run(8).reset_counts()
    found.run(600)
    assert found.tokens / found.steps == pytest.approx(before, rel=0.05)
    assert found.accepted / found.shown == pytest.approx(rate, rel=0.05)


# a drafter that costs


def costly(odds: Odds, per_depth: float, count: int = 1, **options: object) -> tuple[World, ChainDrafter]:
    drafter = ChainDrafter("m", odds, costly=True)
    cost = affine_cost(0.005, 0.0004, m=lambda n, depth: per_depth * depth * (1 + 0.1 * n))
    return World(GoodputPolicy(cost, **options), cost, [drafter], count), drafter  # type: ignore[arg-type]


def test_a_drafter_that_costs_is_asked_as_deep_as_it_pays() -> None:
    found, _ = costly(even(0.8), 0.0006)
    found.run(100).reset_counts()
    goodput = found.run(400).goodput
    fixed = []
    for k in (1, 2, 3, 4, 6, 8):
        cost = affine_cost(0.005, 0.0004, m=lambda n, depth: 0.0006 * depth * (1 + 0.1 * n))
        fixed.append(World(make_policy("fixed", budget=k), cost, [ChainDrafter("m", even(0.8))]).run(400).goodput)
    assert goodput > 0.96 * max(fixed)
    assert goodput > 1.2 * 1 / 0.0054


def test_one_that_does_not_pay_is_left_alone_and_asked_again() -> None:
    found, drafter = costly(even(0.5), 0.004)
    found.run(400).reset_counts()
    drafter.asked = 0
    found.run(1500)
    assert 0 < drafter.asked < 20
    assert found.goodput > 0.98 / 0.0054
    drafter.odds = even(0.99)
    found.cost.draft["m"] = lambda n, depth: 0.0006 * depth
    found.run(900)
    found.reset_counts()
    found.run(100)
    assert found.tokens > 3 * found.steps


def test_what_a_cheaper_drafter_has_found_is_not_paid_for_again() -> None:
    cost = affine_cost(0.005, 0.0002, m=lambda n, depth: 0.0008 * depth, d=lambda n, depth: CHEAP * n)
    lookup, model = ChainDrafter("d", even(0.97)), ChainDrafter("m", even(0.8), costly=True)
    World(GoodputPolicy(cost), cost, [lookup, model]).run(300)
    assert model.asked < 60 < lookup.asked


# the forest that comes out


def trim(policy: GoodputPolicy, forest: DraftForest, trims: bool = True) -> DraftForest:
    seqs = [World.sequence(b) for b in range(forest.num_trees)]
    return policy.trim(forest, seqs, Load(0, 0, 16, 0, len(seqs), trims=trims)).forest


def test_sampled_trees_stay_whole_where_the_verifier_judges_by_their_law() -> None:
    dear = affine_cost(0.001, 0.01)
    forest = DraftForest.from_chains([1, 2], [[3, 4], [5, 6]], ["d", "d"])
    forest.estimate = np.array([1.0, 0.1, 0.1, 1.0, 0.1, 0.1])
    forest.law = torch.full((2, 64), 1 / 64)
    forest.law_row = np.array([0, 1, -1, -1, -1, -1], dtype=np.int32)
    assert trim(GoodputPolicy(dear), forest).num_drafts <= 2  # no more than a probe
    kept = trim(GoodputPolicy(dear), forest, trims=False)
    assert kept.size(0) == 3 and kept.size(1) <= 3


def test_reasons_and_numbers_fit_the_forest() -> None:
    found = world(mixed, "goodput", "affine", 8)
    seen: set[str] = set()
    for _ in range(300):
        found.step()
        choice = found.choice
        assert choice is not None and len(choice.reasons) == len(choice.dropped) == 8
        assert all(lost >= 0 for lost in choice.dropped)
        assert choice.plain_seconds == pytest.approx(choice.decode_seconds)
        assert choice.seconds >= choice.plain_seconds and 8 <= choice.tokens <= 8 + choice.forest.num_drafts
        seen |= set(choice.reasons)
    assert {"cost"} <= seen <= {"goodput", "cost"}
    assert found.policy.calibration_error < 0.1 and found.policy.cost_error < 0.01


def test_no_guess_is_no_match() -> None:
    policy = GoodputPolicy(affine_cost())
    seqs = [World.sequence(0)]
    policy.budgets(seqs, Load(0, 9, 16))
    assert policy.trim(DraftForest.roots([1]), seqs, Load(0, 0, 16, 0, 1)).reasons == ["no_match"]
    assert policy.trim(DraftForest.roots([]), [], Load(64, 0, 16, 0, 1)).reasons == []


def test_bad_limits_are_refused() -> None:
    with pytest.raises(ValueError, match="max_budget"):
        GoodputPolicy(affine_cost(), max_budget=-1)
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="max_itl_ms"):
            GoodputPolicy(affine_cost(), max_itl_ms=bad)


def test_memory_follows_the_sequences_that_live() -> None:
    found = world(even(0.5), "goodput").run(3)
    for i in range(300):
        found.seqs = [World.sequence(i)]
        found.run(1)
        found.policy.forget(i)
    assert isinstance(found.policy, GoodputPolicy) and not found.policy._records
