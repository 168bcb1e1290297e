"""The thread beside rank 0: who waits too long is freed by ending the others, and what cannot be freed ends altogether."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count

import pytest

from engine.executors.ranks import RankLostError
from engine.executors.watchdog import Watchdog

TICK = 0.001


class SomeRanks:
    def __init__(self) -> None:
        self.ended = threading.Event()
        self.why: Exception | None = None

    def lost(self) -> Exception | None:
        return self.why

    def end(self) -> None:
        self.ended.set()

    def leave(self) -> None:
        pass


@pytest.fixture
def ranks() -> SomeRanks:
    return SomeRanks()


@pytest.fixture
def watched(ranks: SomeRanks) -> Iterator[list[Watchdog]]:
    made: list[Watchdog] = []
    yield made
    for watchdog in made:
        watchdog.stop()


def test_a_wait_that_does_not_end_ends_the_ranks_and_then_the_process(ranks: SomeRanks, watched: list[Watchdog]) -> None:
    left = threading.Event()
    made = Watchdog(lambda: "the same", ranks, 5 * TICK, tick=TICK, grace=3 * TICK, leave=lambda code: left.set())
    watched.append(made)
    made.armed = True
    assert left.wait(30) and ranks.ended.is_set()
    assert isinstance(made.why, RankLostError)


def test_who_notices_by_itself_goes_on(ranks: SomeRanks, watched: list[Watchdog]) -> None:
    left = threading.Event()
    made = Watchdog(
        lambda: "the same" if not ranks.ended.is_set() else None, ranks, 5 * TICK, tick=TICK, leave=lambda code: left.set()
    )
    watched.append(made)
    made.armed = True
    assert ranks.ended.wait(30)
    made._thread.join(30)
    assert not made._thread.is_alive() and not left.is_set()


def test_waits_that_end_and_the_start_take_their_time(ranks: SomeRanks, watched: list[Watchdog]) -> None:
    """Many waits, each of which ends; and one that does not, before the ranks have loaded their parts."""
    enough, seen = threading.Event(), count()

    def look() -> int:
        number = next(seen)
        if number > 100:
            enough.set()
        return number

    watched.append(Watchdog(look, ranks, 3 * TICK, tick=TICK))
    watched[0].armed = True
    watched.append(Watchdog(lambda: "the same", ranks, 3 * TICK, tick=TICK))
    assert enough.wait(30) and not ranks.ended.is_set()
    assert watched[0].why is None and watched[1].why is None


def test_a_rank_that_is_gone_is_told(ranks: SomeRanks, watched: list[Watchdog]) -> None:
    made = Watchdog(lambda: None, ranks, 60, tick=TICK)
    watched.append(made)
    ranks.why = RankLostError("rank 1 was killed by SIGKILL")
    made._thread.join(30)
    assert made.why is ranks.why
