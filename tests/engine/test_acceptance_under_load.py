"""What is accepted depends on the text alone: not on the batch, and not on a spike that came and went.

A model that drafts for itself is always right while its keys and values are, so that acceptance tells how right they are: a
drafter that was off and has not caught up is the classic bug. float32, on a tiny random model; on SmolLM2 marked long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engine.draft_text import DraftText, Moves
from engine.policies.goodput import GoodputPolicy
from engine.registry import DRAFTERS
from engine.request import Request
from tests.engine.policies.world import FormulaCost
from tests.engine.real import answers, make_engine
from tests.engine.under_load import House, Tally, real_house, through_a_spike, tiny_house

NAMES = sorted(set(DRAFTERS) - {"none"})
BUDGET = 6
BEFORE = 12  # steps
FREE_ROWS = 24  # of a step: three sequences with all their drafts
SPIKE = 24  # requests
PARAMETERS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7}]


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2", marks=[pytest.mark.long, pytest.mark.timeout(1800)])])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    if request.param == "tiny":
        return tiny_house(folder)
    return real_house(request.getfixturevalue("smollm2_dir"), folder)


def pays_alone() -> FormulaCost:
    """A depth costs a twentieth of a step, rows are free up to a bound, and beyond it a row costs more than a token is worth."""
    return FormulaCost(lambda n: 0.01 + 0.003 * np.maximum(n - FREE_ROWS, 0), {"draft_model": lambda n, depth: 0.0005 * depth})


def few(house: House) -> list[Request]:
    return [house.request(i, 200, **params) for i, params in enumerate(PARAMETERS)]


def many(house: House) -> list[Request]:
    return [house.request(i % 16, 20 + i % 8, f"spike {i} ", temperature=i % 2) for i in range(SPIKE)]


def spike_under_goodput(house: House) -> Tally:
    policy = GoodputPolicy(pays_alone(), max_budget=BUDGET, drafters=["draft_model"])
    engine = make_engine(house.worker, [house.drafter("draft_model", branches=1, least=0.0)], policy=policy)
    return through_a_spike(engine, few(house), many(house), BEFORE)


def report(title: str, tally: Tally, names: list[str]) -> None:
    """For who looks (pytest -s)."""
    for phase in ("before", "spike", "drain", "after"):
        drafted, accepted, steps = tally.counts(phase, names)
        print(f"{title}, {phase}: {drafted} drafted, {accepted} accepted ({accepted / max(drafted, 1):.3f}), {steps} steps")


def test_a_spike_and_a_drain_leave_acceptance_as_it_was(house: House) -> None:
    """Goodput drafts for a few, not in the spike, and again after it: as well as before."""
    tally = spike_under_goodput(house)
    names = [one.request_id for one in few(house)]
    report("goodput, draft_model", tally, names)
    per_step = {phase: drafted / steps for phase in ("before", "spike", "after") for drafted, _, steps in [tally.counts(phase)]}
    assert min(per_step["before"], per_step["after"]) > 2, "it pays alone"
    assert per_step["spike"] < 0.1, "and not in the spike, but for probes"
    assert tally.counts("spike", names)[2] > 16 * len(names), "it falls further behind than is read without asking"
    before, after = tally.acceptance("before", names), tally.acceptance("after", names)
    assert after == pytest.approx(before, rel=0.05)
    assert before > 0.99


def test_a_drafter_that_does_not_catch_up_would_be_noticed(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic bug: positions go on while nothing is written there."""
    real = DraftText.follow

    def forgets(self: DraftText) -> Moves:
        moves = real(self)
        if self.valid and self.backlog > 2:  # more than the tail of its own draft
            self.valid = self.num_committed - 1
        return moves

    monkeypatch.setattr(DraftText, "follow", forgets)
    tally = spike_under_goodput(house)
    names = [one.request_id for one in few(house)]
    report("broken catching up", tally, names)
    assert tally.acceptance("before", names) > 0.99
    assert tally.acceptance("after", names) < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_a_spike_changes_no_draft_of_the_others(name: str, house: House) -> None:
    """A fixed budget: in every step the same is drafted and accepted, whoever else is there."""
    asked = [house.request(i, 100) for i in range(4)]
    calm = Tally().watch(engine := make_engine(house.worker, [house.drafter(name)], budget=BUDGET))
    answers(engine, asked)
    engine = make_engine(house.worker, [house.drafter(name)], budget=BUDGET)
    tally = through_a_spike(engine, asked, [one for one in many(house) if one.params.max_tokens < 24], 5)
    report(name, tally, [one.request_id for one in asked])
    for one in asked:
        assert tally.of(one.request_id) == calm.of(one.request_id)
    assert sum(accepted for one in asked for _, accepted in calm.of(one.request_id)) > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_does_not_matter(name: str, house: House) -> None:
    """Alone, four or sixteen at once: each request drafts and is granted the same, and takes as many steps."""
    asked = [house.request(i, 24, **PARAMETERS[i % 2]) for i in range(16)]
    found: dict[int, dict[str, tuple[int, int, int]]] = {}
    for size in (1, 4, 16):
        counts = found[size] = {}
        for first in range(0, 16, size):
            engine = make_engine(house.worker, [house.drafter(name)], budget=BUDGET)
            for (request_id, _), answer in answers(engine, asked[first : first + size]).items():
                assert answer.usage is not None
                counts[request_id] = answer.usage.drafted_tokens, answer.usage.accepted_tokens, answer.usage.steps
    print(f"{name}: {[sum(column) for column in zip(*found[1].values(), strict=True)]} drafted, accepted, steps")
    assert found[1] == found[4] == found[16]
    assert sum(count[1] for count in found[1].values()) > 0
