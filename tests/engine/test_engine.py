"""The engine as its caller sees it: requests in, deltas out, and nothing left behind. No torch."""

from __future__ import annotations

import logging
import math
import random
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import EngineStats
from engine.request import Request
from tests.fakes import FakeExecutor, Guess, fake_info, garbage, good_guess, make_request, mixed_guess, no_guess, rollout

GUESSES: list[Guess] = [no_guess, good_guess, garbage, mixed_guess]


def make_engine(
    guess: Guess = mixed_guess, policy: str = "fixed", check: bool = True, **info: object
) -> tuple[Engine, FakeExecutor]:
    executor = FakeExecutor(fake_info(**info), guess)
    return Engine(EngineConfig(model="fake", policy=policy, budget=4, check_integrity=check), executor), executor


def generate(engine: Engine, *requests: Request) -> dict[tuple[str, int], list[int]]:
    """Run until idle; the tokens of every sequence."""
    for request in requests:
        engine.add(request)
    tokens: dict[tuple[str, int], list[int]] = {}
    while engine.has_work():
        for delta in engine.step():
            tokens.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
    return tokens


def expected(request: Request, index: int = 0) -> list[int]:
    seq = rollout(request, index)
    return seq.tokens[seq.num_prompt :]


class Schedules(RuleBasedStateMachine):
    """Any order of add, step, abort and failure, in pools so small that everybody is preempted now and then.

    The toy model reads every KV slot back at every step, the engine proves its block pool after every step and abort,
    and in the end everyone who was neither aborted nor failed has the tokens of the direct rollout.
    """

    @initialize(
        num_blocks=st.integers(6, 24),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 6),
        max_num_batched_tokens=st.integers(1, 40),
        budget=st.integers(0, 9),
        caching=st.booleans(),
        policy=st.sampled_from(["fixed", "goodput"]),
    )
    def start(self, num_blocks: int, block_size: int, caching: bool, budget: int, policy: str, **limits: int) -> None:
        self.room = num_blocks * block_size
        info = fake_info(num_blocks=num_blocks, block_size=block_size, max_model_len=self.room, **limits)
        self.limit = info.max_num_batched_tokens
        self.executor = FakeExecutor(info)
        config = EngineConfig(model="fake", policy=policy, budget=budget, enable_prefix_caching=caching, check_integrity=True)
        self.engine = Engine(config, self.executor)
        self.requests: dict[str, Request] = {}
        self.gone: set[str] = set()
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ended: dict[tuple[str, int], str] = {}

    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        max_tokens = data.draw(st.integers(1, max(1, self.room // 2)))
        length = data.draw(st.integers(1, self.room - max_tokens))
        seed = data.draw(st.integers(0, 2))  # few seeds: prompts share prefixes
        request = make_request(
            f"r{len(self.requests)}",
            [(seed + i * i) % 7 + 2 for i in range(length)],
            max_tokens,
            n=data.draw(st.sampled_from([1, 1, 1, 3])),
            priority=data.draw(st.integers(0, 2)),
            cache_salt=data.draw(st.sampled_from(["", "", "s"])),
            seed=data.draw(st.integers(0, 1)),
            ignore_eos=data.draw(st.booleans()),
            prompt_logprobs=data.draw(st.sampled_from([None, None, 0])),
        )
        self.requests[request.request_id] = request
        self.engine.add(request)

    @rule(count=st.integers(1, 6), guess=st.sampled_from(GUESSES), seed=st.integers(0, 99))
    def step(self, count: int, guess: Guess, seed: int) -> None:
        self.executor.guess = guess
        self.executor.rng.seed(seed)
        for _ in range(count):
            self.one_step()

    def one_step(self) -> None:
        had_work = self.engine.has_work()
        planned = len(self.executor.plans)
        deltas = self.engine.step()
        assert (len(self.executor.plans) > planned) == had_work
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert key not in self.ended, "a delta after the last one"
            assert delta.request_id not in self.gone, "a delta after the abort"
            self.tokens.setdefault(key, []).extend(delta.token_ids)
            if delta.finish_reason is not None:
                self.ended[key] = delta.finish_reason
        if had_work:
            assert sum(row.num_new + row.budget for row in self.executor.plans[-1].rows) <= self.limit

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.requests)))
        self.engine.abort(request_id)
        self.gone.add(request_id)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.executor.fail = {data.draw(st.sampled_from(sorted(self.requests)))}
        self.one_step()
        self.executor.fail = set()

    @invariant()
    def whole(self) -> None:
        self.engine.scheduler.check_integrity()
        assert all(entry.seq.block_ids for entry in self.engine.scheduler.running)
        assert not any(entry.seq.block_ids or entry.seq.num_computed for entry in self.engine.scheduler.waiting)
        assert len(self.engine.scheduler.running) <= min(self.limit, self.engine.info.max_num_seqs)
        for entries in (self.engine.scheduler.running, self.engine.scheduler.waiting):
            assert entries == sorted(entries, key=lambda entry: entry.key)
        self.see_room()

    def see_room(self) -> None:
        """Who waits first is not refused when there is room for it."""
        scheduler, pool = self.engine.scheduler, self.engine.pool
        if not scheduler.waiting or len(scheduler.running) >= min(self.limit, self.engine.info.max_num_seqs):
            return
        head = scheduler.waiting[0]
        matched = pool.match(head.seq.tokens, head.chain) if head.prompt_logprobs is None else []
        held = {block for entry in scheduler.running for block in entry.seq.block_ids}
        room = pool.num_blocks - len(held.difference(matched)) - pool.blocks_for(head.seq.num_tokens)
        assert (scheduler._find_room(head) is not None) == (room >= len(scheduler.running))

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(20_000):
            if not self.engine.has_work():
                break
            self.one_step()
        assert not self.engine.has_work()
        assert self.engine.pool.is_idle()
        for request in self.requests.values():
            for index in range(request.n):
                key = (request.request_id, index)
                tokens, wanted = self.tokens.get(key, []), expected(request, index)
                if request.request_id in self.gone or self.ended[key] == "error":
                    assert tokens == wanted[: len(tokens)]
                else:
                    assert tokens == wanted


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.parametrize("policy", ["off", "fixed", "goodput"])
@pytest.mark.parametrize("guess", GUESSES)
def test_no_policy_and_no_draft_changes_a_token(policy: str, guess: Guess) -> None:
    requests = [make_request(f"r{i}", 3 + 5 * i, 24, n=1 + i % 2, ignore_eos=i % 3 == 0) for i in range(8)]
    engine, _ = make_engine(guess, policy)
    tokens = generate(engine, *requests)
    assert tokens == {(request.request_id, index): expected(request, index) for request in requests for index in range(request.n)}


def test_policy_off_drafts_nothing() -> None:
    engine, executor = make_engine(good_guess, "off")
    generate(engine, make_request("a", 5, 20, ignore_eos=True))
    assert {row.budget for plan in executor.plans for row in plan.rows} == {0}
    assert engine.stats().num_drafts == 0


def test_three_thousand_requests_leave_nothing_behind() -> None:
    engine, executor = make_engine(num_blocks=40, max_model_len=160, max_num_seqs=16, max_num_batched_tokens=64, check=False)
    executor.reread = executor.keep_plans = False
    rng = random.Random(7)
    added = finished = 0
    aborted: set[str] = set()
    errors = 0
    while added < 3000 or engine.has_work():
        while added < 3000 and engine.scheduler.num_waiting < 8:
            prompt = [rng.randrange(2, 5) for _ in range(rng.randint(1, 60))]
            engine.add(make_request(f"r{added}", prompt, rng.randint(1, 24), priority=rng.randint(0, 1), seed=added))
            added += 1
        if rng.random() < 0.05:
            executor.fail = {f"r{rng.randrange(max(0, added - 20), added)}"}
        for delta in engine.step():
            finished += delta.finish_reason is not None
            errors += delta.finish_reason == "error"
        executor.fail.clear()
        if rng.random() < 0.1:
            victim = f"r{rng.randrange(max(0, added - 20), added)}"
            if victim in engine.scheduler._groups:
                aborted.add(victim)
            engine.abort(victim)
    assert engine.pool.is_idle()
    engine.scheduler.check_integrity()
    assert finished + len(aborted) == 3000
    assert errors
    assert aborted
    stats = engine.stats()
    assert stats.preemptions > 50
    assert (stats.running, stats.waiting, stats.blocks_used, stats.blocks_total) == (0, 0, 0, 40)
    assert len(executor.seqs) <= 32  # whoever ended in the last steps: no further plan has said so yet


# ---- stats


def test_stats_add_up() -> None:
    engine, executor = make_engine(good_guess)
    requests = [make_request(f"r{i}", 6, 10, n=2, ignore_eos=True) for i in range(3)]
    tokens = generate(engine, *requests)
    stats = engine.stats()
    assert stats.steps == len(executor.plans) == len(stats.draft_nodes) == len(stats.iteration_tokens)
    assert stats.prompt_tokens == 18  # a prompt counts once, however many samples are drawn from it
    assert stats.generation_tokens == sum(map(len, tokens.values())) == 60
    assert stats.num_draft_tokens == sum(stats.draft_nodes) == stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos)
    assert stats.num_accepted_tokens_per_pos[0] == stats.num_drafts
    assert stats.draft_tokens_by_drafter == stats.accepted_tokens_by_drafter == {"fake": stats.num_draft_tokens}
    assert sum(stats.iteration_tokens) >= stats.num_draft_tokens + 18
    assert stats.seconds_forward == pytest.approx(1e-6 * stats.steps)
    assert stats.seconds_step > 0


def test_observations_are_given_once_and_counters_stay() -> None:
    engine, _ = make_engine()
    generate(engine, make_request("a", 5, 9))
    first, second = engine.stats(), engine.stats()
    assert first.draft_nodes
    assert (second.draft_nodes, second.iteration_tokens) == ([], [])
    assert second.generation_tokens == first.generation_tokens > 0


def test_stats_are_a_copy() -> None:
    engine, _ = make_engine(good_guess)
    generate(engine, make_request("a", 5, 9, ignore_eos=True))
    before = engine.stats()
    frozen = EngineStats(**{name: getattr(before, name) for name in EngineStats.__struct_fields__})
    frozen.num_accepted_tokens_per_pos = list(before.num_accepted_tokens_per_pos)
    frozen.draft_tokens_by_drafter = dict(before.draft_tokens_by_drafter)
    generate(engine, make_request("b", 5, 9, ignore_eos=True))
    assert before == frozen


def test_gauges_show_who_runs_and_who_waits() -> None:
    engine, _ = make_engine(max_num_seqs=2)
    for i in range(3):
        engine.add(make_request(f"r{i}", 5, 9, n=2, ignore_eos=True))
    engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (2, 4)
    assert 0 < stats.blocks_used < stats.blocks_total


# ---- what the engine refuses


BAD_FIELDS = [
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [64]}),
    ("prompt", {"prompt": [3, -1]}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 508}),
    ("seed", {"seed": -1}),
    ("seed", {"seed": 2**64}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": math.nan}),
    ("temperature", {"temperature": math.inf}),
    ("top_p", {"top_p": 0.0}),
    ("top_p", {"top_p": 1.1}),
    ("top_p", {"top_p": math.nan}),
    ("top_k", {"top_k": -1}),
    ("min_p", {"min_p": -0.1}),
    ("min_p", {"min_p": math.nan}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("repetition_penalty", {"repetition_penalty": math.inf}),
    ("presence_penalty", {"presence_penalty": 2.1}),
    ("presence_penalty", {"presence_penalty": math.nan}),
    ("frequency_penalty", {"frequency_penalty": -2.1}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": 9}),
    ("logit_bias", {"logit_bias": {64: 1.0}}),
    ("logit_bias", {"logit_bias": {3: math.nan}}),
    ("allowed_token_ids", {"allowed_token_ids": []}),
    ("allowed_token_ids", {"allowed_token_ids": [64]}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("bad_words", {"bad_words": [[]]}),
    ("bad_words", {"bad_words": [[3], [64]]}),
    ("logprobs", {"logprobs": -1}),
    ("logprobs", {"logprobs": 65}),
    ("prompt_logprobs", {"prompt_logprobs": 10**9}),
]


@pytest.mark.parametrize(("field", "change"), BAD_FIELDS)
def test_a_request_out_of_bounds_is_refused_naming_the_field(field: str, change: dict[str, object]) -> None:
    engine, _ = make_engine()
    with pytest.raises(ValueError, match=f"^{field}: "):
        engine.add(make_request("a", **change))  # type: ignore[arg-type]  # fields by name
    assert not engine.has_work()
    assert generate(engine, make_request("b"))


def test_a_prediction_outside_the_vocabulary_is_refused() -> None:
    engine, _ = make_engine()
    request = Request(request_id="a", prompt_ids=[3], params=make_request().params, prediction_ids=[99])
    with pytest.raises(ValueError, match=r"^prediction: token ids must be between 0 and 63"):
        engine.add(request)


def test_the_bounds_themselves_are_allowed() -> None:
    extremes: dict[str, object] = {
        "seed": 2**64 - 1,
        "temperature": 0.0,
        "top_p": 1e-9,
        "min_p": 1.0,
        "presence_penalty": 2.0,
        "frequency_penalty": -2.0,
        "min_tokens": 510,
        "logit_bias": {0: -100.0, 63: 100.0},
        "allowed_token_ids": [63],
        "bad_words": [[0]],
        "stop_token_ids": [63],
        "logprobs": 64,
    }
    engine, _ = make_engine(num_blocks=128)
    engine.add(make_request("a", [0, 63], 510, n=128, **extremes))
    assert engine.has_work()


def test_an_unknown_policy_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="there is no policy 'fixd'"):
        make_engine(policy="fixd")


# ---- the end


def test_close_closes_the_executor() -> None:
    engine, executor = make_engine()
    engine.close()
    assert executor.closed


def test_a_leak_is_an_error_where_integrity_is_checked() -> None:
    engine, _ = make_engine()
    engine.add(make_request("a", 5, 3))
    engine.step()
    engine.pool.allocate(2)
    with pytest.raises(RuntimeError, match="block tables"):
        engine.abort("a")


def test_a_leak_found_when_idle_is_logged_and_healed(caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = make_engine(check=False)
    engine.add(make_request("a", 5, 3))
    engine.step()
    engine.pool.allocate(2)
    with caplog.at_level(logging.ERROR, "outrider.engine"):
        engine.abort("a")
    assert "2 blocks in use without a sequence" in caplog.text
    assert engine.pool.is_idle()
    request = make_request("b", 9, 12)
    assert generate(engine, request) == {("b", 0): expected(request)}


def test_the_engine_itself_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import engine.engine; from tests import fakes; fakes.FakeExecutor()"
    subprocess.run([sys.executable, "-c", code], check=True)
