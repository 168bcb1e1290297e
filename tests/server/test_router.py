"""Which engine gets a prompt: rules one by one, and a workload on simulated engines, against random routing."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from engine.messages import EngineInfo, TokenDelta
from engine.request import Request, SamplingParams
from server.router import FIRST_GUESS, MAX_BLOCKS, Placement, Prefixes, Router, chain
from tests.fakes import fake_info

BLOCK = 16


@dataclass
class Engine:
    num_blocks: int = 1000
    ready: bool = True
    restarts: int = 0
    info: EngineInfo | None = field(init=False)

    def __post_init__(self) -> None:
        self.info = fake_info(num_blocks=self.num_blocks)


def prompt(*parts: tuple[int, int], max_tokens: int = 10, salt: str = "", n: int = 1) -> Request:
    """parts: (what, tokens): so many tokens that only parts of the same name have."""
    ids = [1000 * what + i for what, size in parts for i in range(size)]
    return Request(request_id="r", prompt_ids=ids, params=SamplingParams(max_tokens=max_tokens), cache_salt=salt, n=n)


def delta(tokens: int, finished: bool = False, index: int = 0) -> TokenDelta:
    return TokenDelta(request_id="r", index=index, token_ids=[0] * tokens, finish_reason="stop" if finished else None)


def router(*engines: Engine, affinity: bool = True) -> Router:
    return Router(engines or (Engine(), Engine()), BLOCK, affinity=affinity)


def finish(placement: Placement, tokens: int = 10) -> int:
    placement.took(delta(tokens, finished=True))
    placement.end()
    return placement.index


class TestPlaces:
    def test_new_prompts_spread_and_known_ones_go_back(self) -> None:
        one = router()
        assert [finish(one.place(prompt((what, 64)))) for what in (1, 2, 3, 4)] == [0, 1, 0, 1]
        assert [finish(one.place(prompt((what, 64), (9, 5)))) for what in (4, 4, 3, 1, 2)] == [1, 1, 0, 0, 1]

    def test_the_longest_known_prefix_wins(self) -> None:
        first = Engine()
        one = router(first, Engine())
        finish(one.place(prompt((1, 64))))
        first.ready = False
        finish(one.place(prompt((1, 64), (2, 64))))
        first.ready = True
        assert one.place(prompt((1, 64), (2, 64), (3, 8))).index == 1

    def test_a_prefix_is_left_when_the_others_there_cost_more_than_it_saves(self) -> None:
        one = router()
        finish(one.place(prompt((1, 320))))
        running = [one.place(prompt((1, 320), (what, 80), max_tokens=20)) for what in (2, 3, 4)]
        assert [placement.index for placement in running] == [0, 0, 0]  # 100 each against 320
        assert one.routes[0].owed == 300
        last = one.place(prompt((1, 320), (5, 80), max_tokens=20))
        assert last.index == 0
        moved = one.place(prompt((1, 320), (6, 80), max_tokens=20))  # 400 against 320
        assert moved.index == 1
        finish(moved)
        assert one.place(prompt((1, 320), (7, 80))).index == 1  # it took the prefix along

    def test_salts_share_nothing(self) -> None:
        one = router()
        for _ in range(3):
            assert finish(one.place(prompt((1, 64), salt="a"))) == 0
        assert finish(one.place(prompt((1, 64), salt="b"))) == 1
        assert one.routes[1].matched_tokens == 0

    def test_the_last_token_of_a_prompt_is_never_known(self) -> None:
        one = router()
        for size in (64, 64, 65):
            finish(one.place(prompt((1, size))))
        assert one.routes[0].matched_tokens == 48 + 64
        assert one.routes[0].prompt_tokens == 64 + 64 + 65

    def test_without_a_prefix_cache_only_the_load_counts(self) -> None:
        one = router(affinity=False)
        assert [finish(one.place(prompt((1, 64)))) for _ in range(4)] == [0, 1, 0, 1]
        assert one.place(prompt((1, 64))).index == 0
        assert one.place(prompt((1, 64))).index == 1

    def test_an_engine_that_is_not_ready_gets_nothing(self) -> None:
        gone = Engine()
        one = router(gone, Engine())
        finish(one.place(prompt((1, 64))))
        gone.ready = False
        assert [one.place(prompt((1, 64))).index for _ in range(3)] == [1, 1, 1]

    def test_an_engine_that_was_started_again_knows_nothing(self) -> None:
        again = Engine()
        one = router(again, Engine())
        finish(one.place(prompt((1, 64))))
        finish(one.place(prompt((2, 640))))
        again.restarts = 1
        assert one.place(prompt((1, 64), (3, 8))).index == 0  # new to both, and this one is empty
        assert one.routes[0].matched_tokens == 0

    def test_nobody_is_ready(self) -> None:
        """A choice is made all the same: the engine's own client says why."""
        starting = Engine(ready=False)
        starting.info = None
        assert router(starting, Engine(ready=False)).place(prompt((1, 64))).index in (0, 1)


class TestOwed:
    def test_the_prompt_until_the_first_token_then_the_answer(self) -> None:
        one = router()
        placement = one.place(prompt((1, 100), max_tokens=40))
        route = one.routes[placement.index]
        assert (route.owed, route.in_flight) == (140, 1)
        placement.took(delta(3))
        assert route.owed == 37
        placement.took(delta(37, finished=True))
        assert route.owed == 0
        placement.end()
        assert (route.owed, route.in_flight) == (0, 0)

    def test_an_answer_beyond_what_was_expected_still_counts(self) -> None:
        one = router()
        placement = one.place(prompt((1, 16), max_tokens=10_000, n=2))
        route = one.routes[0]
        assert route.owed == 16 + 2 * FIRST_GUESS
        placement.took(delta(500))
        assert route.owed == 2
        placement.took(delta(1, finished=True, index=1))
        assert route.owed == 1
        placement.end()  # the client left
        assert route.owed == 0

    def test_answers_are_expected_to_be_as_long_as_they_have_been(self) -> None:
        one = router()
        for _ in range(200):
            finish(one.place(prompt((1, 16), max_tokens=1000)), tokens=30)
        assert one.answer_length == pytest.approx(30, abs=1)

    def test_a_request_that_ends_without_a_token_teaches_nothing(self) -> None:
        one = router()
        one.place(prompt((1, 16))).end()
        assert one.answer_length == FIRST_GUESS
        assert one.routes[0].owed == 0


class TestPrefixes:
    def test_the_latest_are_kept_and_beginnings_outlive_ends(self) -> None:
        known = Prefixes(6)
        first, second = chain(prompt((1, 64)), BLOCK), chain(prompt((2, 64)), BLOCK)
        known.add(first)
        known.add(second)
        assert len(known) == 6
        assert (known.match(first), known.match(second)) == (2, 4)

    def test_an_engine_is_remembered_by_as_many_blocks_as_it_has(self) -> None:
        one = router(Engine(num_blocks=8), Engine(num_blocks=MAX_BLOCKS * 4))
        for what in range(1, 9):
            finish(one.place(prompt((what, 64))))
        assert len(one.routes[0].prefixes) == 8
        assert one.routes[1].prefixes.capacity == MAX_BLOCKS

    def test_digests_stand_for_everything_before(self) -> None:
        one, other = chain(prompt((1, 16), (2, 16)), BLOCK), chain(prompt((3, 16), (2, 31)), BLOCK)
        assert len(one) == len(other) == 2
        assert not set(one) & set(other)


@dataclass
class Work:
    request: Request
    placement: Placement | None  # None: routed by chance
    arrival: int  # step
    prompt: int  # tokens left
    answer: int  # tokens left


class SimulatedEngine(Engine):
    """In a step it takes up to 256 prompt tokens, first come first served, and one token for each answer that has begun."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.cache = Prefixes(self.num_blocks)
        self.work: list[Work] = []
        self.hits = self.tokens = 0

    def add(self, request: Request, placement: Placement | None, now: int, answer: int) -> None:
        digests, size = chain(request, BLOCK), len(request.prompt_ids)
        known = min(self.cache.match(digests) * BLOCK, size - 1)
        self.hits += known
        self.tokens += size
        self.cache.add(digests)
        self.work.append(Work(request, placement, now, size - known, answer))

    def step(self) -> list[Work]:
        """What has ended."""
        room = 256
        for work in self.work:
            took = min(work.prompt, room)
            work.prompt -= took
            room -= took
            if not work.prompt and not took:
                work.answer -= 1
                if work.placement is not None:
                    work.placement.took(delta(1, finished=not work.answer))
        ended = [work for work in self.work if not work.answer]
        self.work = [work for work in self.work if work.answer]
        return ended


@dataclass
class Outcome:
    hit_rate: float
    shares: list[float]  # of the prompt tokens
    steps: float  # from arrival to the end of the answer, mean


Pick = Callable[[Request], Placement | int]


def simulate(num_engines: int, prefixes: int, pick_of: Callable[[list[SimulatedEngine]], Pick], seed: int = 1) -> Outcome:
    """600 requests, as many per step as there are engines: 320 tokens of a system prompt, 40 of a question, 5 to 40 of answer."""
    rng = random.Random(seed)
    engines = [SimulatedEngine(num_blocks=200) for _ in range(num_engines)]
    pick = pick_of(engines)
    spent: list[int] = []
    now = sent = 0
    while len(spent) < 600:
        for _ in range(min(num_engines, 600 - sent)):
            request = prompt((rng.randrange(1, prefixes + 1), 320), (1000 + sent, 40), max_tokens=100)
            sent += 1
            where = pick(request)
            placement = None if isinstance(where, int) else where
            index = placement.index if placement is not None else where
            engines[index].add(request, placement, now, rng.randint(5, 40))
        now += 1
        for work in [work for engine in engines for work in engine.step()]:
            spent.append(now - work.arrival)
            if work.placement is not None:
                work.placement.end()
    tokens = sum(engine.tokens for engine in engines)
    shares = [engine.tokens / tokens for engine in engines]
    return Outcome(sum(engine.hits for engine in engines) / tokens, shares, sum(spent) / len(spent))


def routed(engines: list[SimulatedEngine]) -> Pick:
    return Router(engines, BLOCK).place


def at_random(engines: list[SimulatedEngine]) -> Pick:
    rng = random.Random(2)
    return lambda request: rng.randrange(len(engines))


@pytest.mark.parametrize("num_engines", [2, 4])
def test_more_is_found_in_caches_than_by_chance_and_answers_come_sooner(num_engines: int) -> None:
    """16 system prompts; an engine's cache holds 10 of them."""
    by_score, by_chance = simulate(num_engines, 16, routed), simulate(num_engines, 16, at_random)
    assert by_score.hit_rate > 1.3 * by_chance.hit_rate
    assert by_score.steps < by_chance.steps
    assert min(by_score.shares) > 0.6 / num_engines


def test_one_prefix_for_all_keeps_no_engine_idle() -> None:
    outcome = simulate(2, 1, routed)
    assert outcome.hit_rate > 0.85
    assert min(outcome.shares) > 0.35
    assert outcome.steps < 1.1 * simulate(2, 1, at_random).steps


def test_the_same_workload_is_routed_the_same_way() -> None:
    assert simulate(2, 8, routed) == simulate(2, 8, routed)
