"""A drafter that catches up is not taken for one that hangs, and its drafts pay for it in the end."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import pytest

from engine.drafting import Drafting, FirstWins
from engine.protocols import NO_SIGNALS, Observed, Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from tests.toy import sequence


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Reader:
    """Takes the time it is told to, and guesses one token when it has caught up."""

    name = "reader"
    needs = NO_SIGNALS
    siblings = Siblings.POINT
    costly = True
    patience = 3.0
    depth_price = 0.0

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.drafting = self.catching = self._caught_up = 0.0

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        self.clock.now += self.drafting + self.catching
        self._caught_up = self.catching
        return DraftForest.from_chains([seq.tokens[-1] for seq in seqs], [() if self.catching else (1,)] * len(seqs))

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        pass

    def forget(self, seq_id: int) -> None:
        pass

    def backlog(self, seq: Sequence) -> int:
        return 0

    def take_catch_up(self) -> float:
        taken, self._caught_up = self._caught_up, 0.0
        return taken


class Prices(FirstWins):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def drafted(self, drafter: str, sequences: int, depth: int, seconds: float) -> None:
        self.seconds.append(seconds)


def test_catching_up_is_no_price_of_a_draft_and_yet_is_paid() -> None:
    clock, policy = Clock(), Prices()
    reader = Reader(clock)
    drafting = Drafting([reader], 10, clock=clock)
    reader.drafting, reader.catching = 0.1, 8.0
    assert drafting.draft([sequence()], [4], policy).num_drafts == 0
    assert policy.seconds == [] and drafting.take_fallbacks() == {}
    assert drafting.take_seconds() == {"reader": pytest.approx(8.1)}
    reader.catching = 0.0
    for _ in range(400):
        assert drafting.draft([sequence()], [4], policy).num_drafts == 1
    assert policy.seconds[0] > policy.seconds[1] > policy.seconds[50] > policy.seconds[-1] == pytest.approx(0.1, abs=1e-3)
    assert sum(policy.seconds) == pytest.approx(400 * 0.1 + 8.0, abs=1e-2)


def test_a_drafter_that_costs_is_given_more_time() -> None:
    clock = Clock()
    reader = Reader(clock)
    drafting = Drafting([reader], 10, clock=clock)
    reader.drafting = 2.9
    assert drafting.draft([sequence()], [4]).num_drafts == 1
    reader.drafting = 3.1
    assert drafting.draft([sequence()], [4]).num_drafts == 0
    assert drafting.take_fallbacks() == {"slow": 1}
