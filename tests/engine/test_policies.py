"""Policies `off` and `fixed`, the registry that finds methods by name, and the pairing rule."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from engine import registry
from engine.plan import StepPlan, StepResult, StepTimes
from engine.protocols import Load, Siblings
from engine.registry import check_pairing, make, make_drafter, make_policy
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from tests.fakes import make_request

LOAD = Load(prefill_tokens=0, free_blocks=10, block_size=16)


def sequences(count: int) -> list[Sequence]:
    return [Sequence(i, make_request(f"r{i}")) for i in range(count)]


@pytest.mark.parametrize(("name", "budget", "expected"), [("off", 8, 0), ("fixed", 8, 8), ("fixed", 0, 0), ("fixed", 3, 3)])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_budgets(name: str, budget: int, expected: int, count: int) -> None:
    policy = make_policy(name, budget=budget)
    assert policy.name == name
    assert policy.budgets(sequences(count), LOAD) == [expected] * count


@pytest.mark.parametrize("name", ["off", "fixed"])
def test_these_policies_keep_every_draft_and_learn_nothing(name: str) -> None:
    policy = make_policy(name, budget=4)
    forest = DraftForest.from_chains([1, 2], [[3, 4], [5]])
    choice = policy.trim(forest, sequences(2), LOAD)
    assert choice.forest is forest and choice.dropped == [0, 0] and choice.reasons == ["", ""] and choice.seconds == 0
    assert policy.estimate("d", sequences(2), forest) is None
    policy.drafted("d", 2, 2, 0.1)
    policy.learn(sequences(2), forest, Verdict([[], []], [[7], [8]]))
    policy.observe(StepPlan(1, [], [], []), StepResult([], StepTimes()), 0.1)
    policy.forget(0)
    assert policy.budgets(sequences(2), LOAD) == make_policy(name, budget=4).budgets(sequences(2), LOAD)


def test_without_a_better_idea_the_first_drafter_that_has_a_guess_wins() -> None:
    assert make_policy("fixed").allot(make_drafter("none"), sequences(3), [8, 0, 3], [None, None, 1.5], LOAD) == [8, 0, 0]


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="budget: must not be negative, got -1"):
        make_policy("fixed", budget=-1)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"there is no policy 'fixt' \(did you mean 'fixed'\?\); known: fixed.*, off"):
        make("policy", "fixt")
    with pytest.raises(ValueError, match=r"there is no verifier 'zzz'; known: .*match"):
        make("verifier", "zzz")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, known in registry.KINDS.items() for name in known])
def test_every_line_of_the_registry_leads_to_a_class_of_that_name(kind: str, name: str) -> None:
    module, _, attribute = registry.KINDS[kind][name].partition(":")
    assert getattr(import_module(module), attribute).name == name


def pairing(siblings: Siblings, accepts: set[Siblings]) -> tuple[Any, Any]:
    return SimpleNamespace(name="d", siblings=siblings), SimpleNamespace(name="v", accepts=frozenset(accepts))


@pytest.mark.parametrize("siblings", list(Siblings))
def test_a_pairing_that_would_bias_is_refused(siblings: Siblings) -> None:
    drafter, verifier = pairing(siblings, set(Siblings) - {siblings})
    with pytest.raises(ValueError, match=f"siblings are {siblings.value}, the verifier is exact for"):
        check_pairing([drafter], verifier)
    drafter, verifier = pairing(siblings, {siblings})
    check_pairing([drafter], verifier)


def test_one_biased_drafter_is_enough() -> None:
    good, verifier = pairing(Siblings.POINT, {Siblings.POINT})
    bad, _ = pairing(Siblings.IID, set())
    with pytest.raises(ValueError, match="would change the answers"):
        check_pairing([good, bad], verifier)
