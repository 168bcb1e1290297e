"""What the scheduler promises: nobody stands still, nobody is overtaken, nothing leaks, and no schedule changes a token."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import TokenDelta
from engine.plan import RowResult, StepPlan, StepResult, StepTimes
from engine.request import Request
from engine.sequence import Sequence
from engine.sharing import share_out
from tests.fakes import FakeExecutor, Guess, fake_info, garbage, good_guess, make_request, mixed_guess, no_guess, rollout


class Bench:
    """An engine over the toy model that remembers what every client was told."""

    def __init__(self, guess: Guess = mixed_guess, budget: int = 4, caching: bool = True, **info: object) -> None:
        self.executor = FakeExecutor(fake_info(**info), guess)
        config = EngineConfig(model="fake", policy="fixed", budget=budget, enable_prefix_caching=caching, check_integrity=True)
        self.engine = Engine(config, self.executor)
        self.scheduler = self.engine.scheduler
        self.requests: dict[str, Request] = {}
        self.deltas: dict[tuple[str, int], list[TokenDelta]] = defaultdict(list)

    def add(self, *args: object, **kwargs: object) -> Request:
        request = make_request(*args, **kwargs)  # type: ignore[arg-type]  # handed through
        self.requests[request.request_id] = request
        self.engine.add(request)
        return request

    def step(self) -> StepPlan:
        for delta in self.engine.step():
            self.deltas[delta.request_id, delta.index].append(delta)
        return self.executor.plans[-1]

    def drain(self, limit: int = 5000) -> Bench:
        for _ in range(limit):
            if not self.engine.has_work():
                return self
            self.step()
        raise AssertionError(f"still busy after {limit} steps")

    def tokens(self, request_id: str, index: int = 0) -> list[int]:
        return [token for delta in self.deltas[request_id, index] for token in delta.token_ids]

    def last(self, request_id: str, index: int = 0) -> TokenDelta:
        return self.deltas[request_id, index][-1]

    def check_outputs(self) -> None:
        """Everybody got exactly what the model says when it is asked alone, and one end."""
        for request in self.requests.values():
            for index in range(request.n):
                expected = rollout(request, index)
                assert self.tokens(request.request_id, index) == expected.tokens[expected.num_prompt :]
                deltas = self.deltas[request.request_id, index]
                assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
                assert (deltas[-1].finish_reason, deltas[-1].stop_token_id) == (expected.finish_reason, expected.stop_token_id)
        assert not self.engine.has_work()
        assert self.engine.pool.is_idle()

    def running(self) -> list[str]:
        return [entry.seq.request.request_id for entry in self.scheduler.running]

    def waiting(self) -> list[str]:
        return [entry.seq.request.request_id for entry in self.scheduler.waiting]

    def ids(self, plan: StepPlan) -> list[str]:
        return [self.executor.seqs[row.seq_id].request.request_id for row in plan.rows]


# ---- the step's token budget


def test_a_long_prompt_is_read_in_chunks() -> None:
    bench = Bench(max_num_batched_tokens=10)
    bench.add("a", 35, 2)
    rows = [bench.step().rows[0] for _ in range(4)]
    assert [(row.num_computed, row.num_new) for row in rows] == [(0, 10), (10, 10), (20, 10), (30, 5)]
    assert [row.budget for row in rows[:3]] == [0, 0, 0]
    bench.drain().check_outputs()


@pytest.mark.parametrize("guess", [no_guess, good_guess, garbage, mixed_guess])
def test_decoding_sequences_gain_a_token_at_every_step_of_a_long_prefill(guess: Guess) -> None:
    bench = Bench(guess, budget=8, max_num_batched_tokens=16, num_blocks=400, max_model_len=1600)
    for name in "abcd":
        bench.add(name, 3, 400, ignore_eos=True)
    bench.step()
    bench.add("long", 300, 2)
    progress = 0
    while not bench.deltas["long", 0]:
        before = {name: len(bench.deltas[name, 0]) for name in "abcd"}
        plan = bench.step()
        assert {name: len(bench.deltas[name, 0]) for name in "abcd"} == {name: count + 1 for name, count in before.items()}
        chunk = next(row for row in plan.rows if row.num_new > 1 or bench.executor.seqs[row.seq_id].num_prompt == 300)
        progress += chunk.num_new
        assert bench.ids(plan).index("long") == len(plan.rows) - 1
    assert progress == 300


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_no_step_is_larger_than_the_budget(data: st.DataObject) -> None:
    limit = data.draw(st.integers(1, 24))
    bench = Bench(budget=data.draw(st.integers(0, 9)), max_num_batched_tokens=limit, max_num_seqs=data.draw(st.integers(1, 6)))
    for i in range(data.draw(st.integers(1, 8))):
        bench.add(f"r{i}", data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12)))
    bench.drain().check_outputs()
    for plan in bench.executor.plans:
        assert 1 <= sum(row.num_new + row.budget for row in plan.rows) <= limit


def test_drafts_leave_a_prompt_at_least_half_of_what_roots_leave() -> None:
    bench = Bench(good_guess, budget=8, max_num_batched_tokens=36, num_blocks=400, max_model_len=1600)
    for name in "abcd":
        bench.add(name, 3, 300, ignore_eos=True)
    for _ in range(3):
        bench.step()
    bench.add("long", 300, 2)
    plan = bench.step()
    assert plan.rows[-1].num_new == 16
    assert [row.budget for row in plan.rows] == [4, 4, 4, 4, 0]


def test_drafters_that_find_nothing_do_not_slow_a_prompt_down() -> None:
    bench = Bench(no_guess, budget=8, max_num_batched_tokens=68, num_blocks=400, max_model_len=1600)
    for name in "abcd":
        bench.add(name, 3, 300, ignore_eos=True)
    for _ in range(30):
        bench.step()
    bench.add("long", 300, 2)
    assert bench.step().rows[-1].num_new == 64 - 3  # of 32 nodes asked for, a tenth stays reserved


def test_policy_off_gives_prompts_the_whole_step() -> None:
    bench = Bench(budget=0, max_num_batched_tokens=20, num_blocks=400, max_model_len=1600)
    bench.add("a", 3, 50, ignore_eos=True)
    bench.step()
    bench.add("long", 100, 2)
    assert bench.step().rows[-1].num_new == 19


def test_the_row_that_reaches_the_last_prompt_token_may_draft() -> None:
    bench = Bench(good_guess, budget=3, max_num_batched_tokens=20)
    bench.add("a", 9, 8, ignore_eos=True)
    plan = bench.step()
    assert (plan.rows[0].num_new, plan.rows[0].budget) == (9, 3)
    assert len(bench.tokens("a")) == 4
    bench.drain().check_outputs()


def test_more_sequences_than_tokens_in_a_step_wait_for_their_turn() -> None:
    bench = Bench(max_num_batched_tokens=3, max_num_seqs=8)
    for i in range(6):
        bench.add(f"r{i}", 4, 6)
    bench.step()
    while bench.engine.has_work():
        assert len(bench.running()) <= 3
        bench.step()
    bench.check_outputs()


# ---- budgets


def test_a_draft_never_reaches_beyond_max_tokens() -> None:
    bench = Bench(good_guess, budget=8)
    bench.add("a", 5, 4, ignore_eos=True)
    bench.add("b", 5, 1)
    plan = bench.step()
    assert [row.budget for row in plan.rows] == [3, 0]
    assert bench.last("b").finish_reason == "length"
    bench.drain().check_outputs()


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.integers(0, 60), st.integers(0, 20))
def test_shares_are_max_min_fair(wants: list[int], total: int, first: int) -> None:
    grants = share_out(wants, total, first)
    assert all(0 <= grant <= want for grant, want in zip(grants, wants, strict=True))
    assert sum(grants) == min(total, sum(wants))
    cut = [grant for grant, want in zip(grants, wants, strict=True) if grant < want]
    assert not cut or max(grants) <= min(cut) + 1  # nobody has more than one node more than anyone who wanted more


def test_what_does_not_divide_goes_round() -> None:
    totals = [0] * 4
    for first in range(8):
        for i, grant in enumerate(share_out([8] * 4, 6, first)):
            totals[i] += grant
    assert totals == [12] * 4


def test_a_step_too_small_for_all_drafts_is_shared_fairly() -> None:
    bench = Bench(good_guess, budget=8, max_num_batched_tokens=20, num_blocks=400, max_model_len=1600)
    for i in range(8):
        bench.add(f"r{i}", 2, 100, ignore_eos=True)
    for _ in range(4):
        plan = bench.step()
    assert sorted(row.budget for row in plan.rows) == [1, 1, 1, 1, 2, 2, 2, 2]
    totals: dict[int, int] = defaultdict(int)
    for _ in range(8):
        for row in bench.step().rows:
            totals[row.seq_id] += row.budget
    assert set(totals.values()) == {12}


# ---- order


def test_first_come_first_served() -> None:
    bench = Bench(max_num_seqs=1)
    for name in "abc":
        bench.add(name, 5, 3)
    bench.drain()
    assert list(bench.deltas) == [("a", 0), ("b", 0), ("c", 0)]


def test_nobody_overtakes_the_first_in_the_queue_even_if_it_would_fit() -> None:
    bench = Bench(budget=0, num_blocks=8, max_model_len=32)
    bench.add("a", 16, 8, ignore_eos=True)
    bench.step()
    bench.add("large", 20, 8)
    bench.add("small", 2, 2)
    bench.step()
    assert bench.waiting() == ["large", "small"]
    bench.drain().check_outputs()


def test_lower_priority_values_run_first() -> None:
    bench = Bench(max_num_seqs=1)
    for name, priority in [("a", 5), ("b", 0), ("c", -3), ("d", 0)]:
        bench.add(name, 5, 3, priority=priority)
    bench.drain()
    assert [request_id for request_id, _ in bench.deltas] == ["c", "b", "d", "a"]
    bench.check_outputs()


def test_a_better_priority_takes_the_place_of_a_worse_one_and_only_of_a_worse_one() -> None:
    bench = Bench(max_num_seqs=2)
    bench.add("good", 5, 30, priority=0, ignore_eos=True)
    bench.add("bad", 5, 30, priority=7, ignore_eos=True)
    bench.step()
    bench.add("equal", 5, 30, priority=0, ignore_eos=True)
    bench.step()
    assert (bench.running(), bench.waiting()) == (["good", "equal"], ["bad"])
    bench.add("late", 5, 30, priority=0)
    bench.step()
    assert (bench.running(), bench.waiting()) == (["good", "equal"], ["late", "bad"])
    bench.drain().check_outputs()


def test_a_better_priority_is_read_before_a_worse_prompt_that_was_begun() -> None:
    bench = Bench(budget=0, max_num_batched_tokens=16, num_blocks=400, max_model_len=1600)
    bench.add("long", 300, 2, priority=5)
    bench.step()
    bench.add("urgent", 20, 2, priority=0)
    bench.add("equal", 20, 2, priority=5)
    plans = [bench.step() for _ in range(2)]
    rows = [[(request_id, row.num_new) for request_id, row in zip(bench.ids(plan), plan.rows, strict=True)] for plan in plans]
    assert rows == [[("urgent", 16)], [("urgent", 4), ("long", 12)]]
    assert (bench.running(), bench.waiting()) == (["urgent", "long"], ["equal"])
    assert bench.engine.stats().preemptions == 0
    bench.drain().check_outputs()


def test_a_worse_prompt_goes_on_while_a_better_one_finds_no_room() -> None:
    bench = Bench(budget=0, max_num_batched_tokens=20, num_blocks=20, max_model_len=80)
    bench.add("first", 30, 9, priority=0, ignore_eos=True)
    bench.add("worse", 30, 2, priority=5)
    bench.step()
    bench.step()
    bench.add("large", 60, 2, priority=0)  # 15 blocks, "first" keeps 8 of 20
    assert bench.ids(bench.step()) == ["first", "worse"]
    assert (bench.running(), bench.waiting()) == (["first", "worse"], ["large"])
    bench.drain().check_outputs()


def test_better_priorities_take_the_places_of_worse_ones_however_small_the_step() -> None:
    bench = Bench(budget=0, max_num_batched_tokens=3, max_num_seqs=8)
    for i in range(3):
        bench.add(f"bad{i}", 1, 40, priority=5, ignore_eos=True)
    bench.step()
    assert len(bench.running()) == 3  # each has a token of every step
    for i in range(4):
        bench.add(f"good{i}", 5, 20, priority=0, ignore_eos=True)
    for _ in range(12):
        bench.step()
        assert len(bench.running()) <= 3
    assert bench.running() == ["good0", "good1", "good2"]
    bench.drain().check_outputs()


def test_nobody_is_preempted_for_a_newcomer_that_would_not_fit_all_the_same() -> None:
    bench = Bench(budget=0, num_blocks=10, max_model_len=40, caching=False)
    bench.add("good", 20, 12, priority=0, ignore_eos=True)
    bench.add("bad", 4, 12, priority=7, ignore_eos=True)
    bench.step()
    bench.add("large", 30, 2, priority=1)
    bench.step()
    assert bench.running() == ["good", "bad"]
    bench.drain().check_outputs()


def test_nobody_is_preempted_for_blocks_that_a_better_sequence_goes_on_sharing() -> None:
    bench = Bench(budget=0, num_blocks=40, max_model_len=160, max_num_batched_tokens=200)
    bench.add("old", 56, 100, priority=0, ignore_eos=True)
    bench.step()
    bench.add("many", 40, 40, n=4, priority=5, ignore_eos=True)  # 10 blocks that all four hold
    for _ in range(6):
        bench.step()
    assert bench.running() == ["old"] + ["many"] * 4
    bench.add("new", 110, 4, priority=0, ignore_eos=True)  # 28 blocks, and "old" leaves 24
    bench.step()
    assert bench.running() == ["old"] + ["many"] * 4
    bench.engine.abort("old")
    bench.step()
    assert bench.running()[0] == "new"
    del bench.requests["old"]
    bench.drain().check_outputs()


def test_a_newcomer_that_shares_most_of_its_prompt_needs_room_for_the_rest_only() -> None:
    bench = Bench(budget=0, num_blocks=20, max_model_len=80)
    good = bench.add("good", 40, 30, priority=0, ignore_eos=True)
    bench.add("bad", 24, 30, priority=5, ignore_eos=True)
    for _ in range(4):
        bench.step()
    bench.add("new", [*good.prompt_ids, *range(2, 10)], 3, priority=0, ignore_eos=True)  # 10 of its 12 blocks are there
    bench.step()
    assert (bench.running(), bench.waiting()) == (["good", "new"], ["bad"])
    bench.drain().check_outputs()
    assert bench.last("new").usage.cached_tokens == 40  # type: ignore[union-attr]


def test_nobody_is_preempted_for_room_that_a_decoding_sequence_grows_into() -> None:
    bench = Bench(budget=0, num_blocks=12, max_model_len=48)
    bench.add("good", 8, 8, priority=0, ignore_eos=True)
    bench.add("bad", 20, 8, priority=5, ignore_eos=True)
    bench.step()
    bench.add("new", 36, 2, priority=0)  # 9 blocks and one that stays back, but "good" takes its third in this step
    bench.step()
    assert bench.running() == ["good", "bad"]
    bench.drain().check_outputs()


def test_nobody_is_preempted_for_a_newcomer_whose_turn_has_not_come() -> None:
    bench = Bench(budget=0, max_num_batched_tokens=16, max_num_seqs=2, num_blocks=400, max_model_len=1600)
    bench.add("bad", 5, 400, priority=5, ignore_eos=True)
    bench.step()
    bench.add("good", 300, 2, priority=0)
    bench.add("between", 5, 2, priority=1)
    bench.step()
    assert bench.running() == ["good", "bad"]
    while bench.scheduler.running[0].seq.num_uncomputed >= 16:
        bench.step()
        assert bench.running() == ["good", "bad"]
    bench.step()
    assert (bench.running(), bench.waiting()) == (["good", "between"], ["bad"])
    bench.drain().check_outputs()


# ---- preemption


def test_the_last_in_the_order_is_preempted_and_loses_nothing() -> None:
    bench = Bench(budget=0, num_blocks=12, max_model_len=48)
    bench.add("a", 10, 24, ignore_eos=True)
    bench.add("b", 10, 24, ignore_eos=True)
    bench.add("c", 10, 24, ignore_eos=True)
    while bench.engine.stats().preemptions == 0:
        bench.step()
    assert bench.running() == ["a", "b"]
    assert bench.waiting() == ["c"]
    before = bench.tokens("c")
    assert before
    bench.drain().check_outputs()
    assert bench.tokens("c")[: len(before)] == before
    assert bench.last("a").usage.preemptions == 0  # type: ignore[union-attr]
    assert bench.last("c").usage.preemptions >= 1  # type: ignore[union-attr]


def test_a_preempted_sequence_comes_back_with_its_whole_table_and_is_not_introduced_twice() -> None:
    bench = Bench(budget=0, num_blocks=12, max_model_len=48)
    for name in "abc":
        bench.add(name, 10, 24, ignore_eos=True)
    bench.drain()
    introduced = [new.seq_id for plan in bench.executor.plans for new in plan.new]
    assert introduced == [0, 1, 2]
    resets = [row for plan in bench.executor.plans for row in plan.rows if row.reset]
    assert len(resets) == 3 + bench.engine.stats().preemptions
    assert len(resets) > 3
    preempted = [seq_id for plan in bench.executor.plans for seq_id in plan.preempted]
    assert sorted(preempted) == sorted(row.seq_id for row in resets[3:]), "whoever comes back was said to have gone"


def test_a_preempted_sequence_finds_what_is_left_of_it() -> None:
    bench = Bench(budget=0, num_blocks=12, max_model_len=48)
    for name in "abc":
        bench.add(name, 10, 24, ignore_eos=True)
    bench.drain()
    back = [row for plan in bench.executor.plans for row in plan.rows if row.reset][3:]
    assert any(row.num_computed > 0 for row in back)
    stats = bench.engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (30, 0)  # counted once, when first admitted


def test_a_newcomer_leaves_a_block_for_each_running_sequence_to_grow_into() -> None:
    bench = Bench(budget=0, num_blocks=8, max_model_len=32)
    bench.add("a", 4, 20, ignore_eos=True)
    bench.add("b", 4, 20, ignore_eos=True)
    bench.step()
    bench.add("c", 16, 4)  # the 4 blocks that are free by then
    bench.step()
    assert bench.running() == ["a", "b"]
    bench.engine.abort("a")
    bench.step()
    assert bench.running() == ["b", "c"]
    del bench.requests["a"]
    bench.drain().check_outputs()


@pytest.mark.parametrize("priority", [0, 5])
def test_the_prefix_of_one_without_room_is_not_looked_up_at_every_step(priority: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(budget=0, num_blocks=100, max_model_len=400, max_num_batched_tokens=400)
    first = bench.add("a", 100, 60, ignore_eos=True)
    bench.add("b", 100, 60, priority=priority, ignore_eos=True)
    bench.step()
    bench.step()
    looked_up: list[int] = []
    match = bench.engine.pool.match
    monkeypatch.setattr(bench.engine.pool, "match", lambda *args: looked_up.append(1) or match(*args))
    tail = make_request("tail", 296).prompt_ids
    bench.add("large", [*first.prompt_ids, *tail], 2)  # of 99 blocks 25 are there; "b" too leaves 73 of the others
    for _ in range(40):
        bench.step()
    assert bench.waiting() == ["large"]
    assert len(looked_up) <= 2
    bench.drain().check_outputs()
    assert bench.last("large").usage.cached_tokens == 100  # type: ignore[union-attr]


def test_one_without_room_gets_it_when_its_prefix_becomes_known() -> None:
    bench = Bench(budget=0, num_blocks=20, max_model_len=80)
    first = bench.add("a", 40, 30, ignore_eos=True)
    bench.add("b", [*first.prompt_ids, *range(2, 10)], 2)  # 12 blocks, of which 10 are there after this step
    bench.step()
    assert (bench.running(), bench.waiting()) == (["a"], ["b"])
    bench.step()
    assert (bench.running(), bench.waiting()) == (["a", "b"], [])
    bench.drain().check_outputs()


def test_what_a_sequence_computes_again_can_be_found_again() -> None:
    bench = Bench(budget=0, num_blocks=8, max_model_len=32)
    first = bench.add("a", 16, 4, priority=1, ignore_eos=True)
    bench.step()
    bench.add("b", 28, 2, ignore_eos=True)  # takes every block that "a" had published
    bench.step()
    assert bench.waiting() == ["a"]
    while "b" in bench.running():
        bench.step()
    while "a" not in bench.running():
        bench.step()
    bench.add("c", first.prompt_ids, 2)
    bench.drain().check_outputs()
    assert bench.last("c").usage.cached_tokens == 12  # type: ignore[union-attr]


def test_drafts_are_dropped_before_anyone_is_preempted() -> None:
    free, tight = (Bench(no_guess, budget=8, num_blocks=blocks, max_model_len=48) for blocks in (64, 12))
    for bench in (free, tight):
        bench.add("a", 12, 10, ignore_eos=True)
        bench.add("b", 12, 10, ignore_eos=True)
        bench.drain().check_outputs()
        assert bench.engine.stats().preemptions == 0  # at the end they fill the 12 blocks exactly
    granted = [[row.budget for plan in bench.executor.plans for row in plan.rows] for bench in (free, tight)]
    assert len(granted[0]) == len(granted[1])
    assert all(few <= many for many, few in zip(*granted, strict=True))
    assert sum(granted[1]) < sum(granted[0])


def test_a_sequence_alone_in_a_full_pool_is_served() -> None:
    bench = Bench(good_guess, budget=8, num_blocks=6, max_model_len=24)
    bench.add("a", 4, 20, ignore_eos=True)
    bench.add("b", 20, 4, ignore_eos=True)
    bench.drain().check_outputs()


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    bench = Bench(num_blocks=6, max_model_len=512)
    with pytest.raises(ValueError, match="20 prompt tokens and 5 more are 25, but a sequence can have 24"):
        bench.add("a", 20, 5)
    assert not bench.engine.has_work()


# ---- prefix cache


def computed_tokens(bench: Bench, request_id: str) -> int:
    """Prompt tokens that were really fed for all samples of a request."""
    seqs = {new.seq_id for plan in bench.executor.plans for new in plan.new if new.request.request_id == request_id}
    prompt = len(bench.requests[request_id].prompt_ids)
    rows = [row for plan in bench.executor.plans for row in plan.rows if row.seq_id in seqs]
    return sum(max(0, min(row.num_computed + row.num_new, prompt) - row.num_computed) for row in rows)


def test_a_second_request_starts_from_the_first_ones_blocks() -> None:
    bench = Bench()
    prompt = list(range(2, 23))
    bench.add("a", prompt, 3)
    bench.drain()
    bench.add("b", prompt, 3)
    bench.drain().check_outputs()
    assert computed_tokens(bench, "b") == 1
    assert bench.last("b").usage.cached_tokens == 20  # type: ignore[union-attr]
    stats = bench.engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (42, 20)


def test_a_conversation_goes_on_from_its_own_answer() -> None:
    bench = Bench(good_guess)
    first = bench.add("a", 9, 12, ignore_eos=True)
    bench.drain()
    bench.add("b", [*first.prompt_ids, *bench.tokens("a"), 2, 3], 3)
    bench.drain().check_outputs()
    assert bench.last("b").usage.cached_tokens == 20  # type: ignore[union-attr]  # 21 tokens, the last one never computed


def test_salts_do_not_share() -> None:
    bench = Bench()
    prompt = list(range(2, 23))
    for i, salt in enumerate(["", "x", "y"]):
        bench.add(f"r{i}", prompt, 3, cache_salt=salt)
        bench.drain()
        assert computed_tokens(bench, f"r{i}") == 21
    bench.check_outputs()


def test_caching_switched_off_computes_everything() -> None:
    bench = Bench(caching=False)
    for name in "ab":
        bench.add(name, list(range(2, 23)), 3, n=2)
        bench.drain()
    bench.check_outputs()
    assert computed_tokens(bench, "b") == 42
    stats = bench.engine.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (0, 0)


# ---- n > 1


@pytest.mark.parametrize("chunk", [16, 40, 64])
def test_siblings_compute_their_prompt_once(chunk: int) -> None:
    bench = Bench(max_num_batched_tokens=chunk, num_blocks=400, max_model_len=1600)
    bench.add("a", 50, 6, n=5)
    bench.drain().check_outputs()
    assert computed_tokens(bench, "a") == 50 + 4 * 2  # 48 of 50 tokens lie in full blocks
    assert len({tuple(bench.tokens("a", index)) for index in range(5)}) == 5


def test_siblings_do_not_hold_up_those_behind_them() -> None:
    bench = Bench(max_num_batched_tokens=16, num_blocks=400, max_model_len=1600)
    bench.add("a", 21, 6, n=5)
    bench.add("b", 5, 6)
    bench.step()
    plan = bench.step()
    assert bench.ids(plan) == ["a", "b"]  # the first sibling finishes its prompt, the others are not there yet
    bench.drain().check_outputs()


def test_a_large_n_costs_memory_only_as_it_runs() -> None:
    bench = Bench(max_num_seqs=4)
    bench.add("a", 9, 3, n=100)
    assert bench.engine.stats().waiting == 100
    while bench.engine.has_work():
        assert len(bench.scheduler.running) + len(bench.scheduler.waiting) <= 5
        bench.step()
    bench.check_outputs()


def test_short_prompts_have_nothing_to_share_and_their_siblings_start_together() -> None:
    bench = Bench()
    bench.add("a", 4, 6, n=3)
    assert len(bench.step().rows) == 3
    bench.drain().check_outputs()


# ---- prompt logprobs


@pytest.mark.parametrize("chunk", [4, 7, 64])
@pytest.mark.parametrize("n", [1, 2])
def test_prompt_logprobs_come_once_with_the_first_tokens_and_for_every_prompt_token(chunk: int, n: int) -> None:
    bench = Bench(max_num_batched_tokens=chunk)
    prompt = list(range(2, 23))
    bench.add("warm", prompt, 2)
    bench.drain()
    bench.add("a", prompt, 4, n=n, prompt_logprobs=0, ignore_eos=True)
    bench.drain().check_outputs()
    for index in range(n):
        first, *rest = bench.deltas["a", index]
        assert first.prompt_logprobs is not None
        assert [entry and entry.logprob for entry in first.prompt_logprobs] == [None, *(-float(token) for token in prompt[1:])]
        assert first.token_ids
        assert all(delta.prompt_logprobs is None for delta in rest)
    assert bench.last("a").usage.cached_tokens == 0  # type: ignore[union-attr]


def test_prompt_logprobs_survive_a_preemption_in_the_middle_of_the_prompt() -> None:
    bench = Bench(budget=0, max_num_batched_tokens=6, num_blocks=14, max_model_len=56)
    bench.add("a", 8, 40, ignore_eos=True)
    bench.step()
    bench.step()
    prompt = list(range(2, 32))
    bench.add("b", prompt, 3, prompt_logprobs=0, ignore_eos=True)
    bench.step()
    bench.add("c", 4, 3, priority=-1)
    bench.scheduler.max_running = 2
    bench.step()
    assert bench.waiting()[0] == "b"
    assert not bench.deltas["b", 0]
    bench.drain().check_outputs()
    logprobs = bench.deltas["b", 0][0].prompt_logprobs or []
    assert [entry and entry.logprob for entry in logprobs] == [None, *(-float(token) for token in prompt[1:])]


def test_logprobs_run_parallel_to_the_tokens_and_end_with_them() -> None:
    bench = Bench(good_guess)
    for i in range(20):
        bench.add(f"r{i}", 4 + i, 40, logprobs=0)
    bench.drain().check_outputs()
    assert any(bench.last(f"r{i}").finish_reason == "stop" for i in range(20))
    for deltas in bench.deltas.values():
        for delta in deltas:
            assert [entry.logprob for entry in delta.logprobs or []] == [-float(token) for token in delta.token_ids]


# ---- ends


def test_usage_counts_what_was_drafted_and_accepted() -> None:
    bench = Bench(good_guess, budget=3)
    bench.add("a", 5, 9, ignore_eos=True)
    bench.drain()
    usage = bench.last("a").usage
    assert usage is not None
    # 4 tokens, 4 tokens, and the last one alone: its draft would have reached behind the end
    assert (usage.steps, usage.drafted_tokens, usage.accepted_tokens) == (3, 6, 6)
    assert (usage.accepted_prediction_tokens, usage.rejected_prediction_tokens) == (0, 0)
    assert usage.first_scheduled_time > 0


def test_prediction_tokens_are_counted_apart() -> None:
    bench = Bench(garbage, budget=3)
    bench.executor.drafter = "prediction"
    bench.add("a", 5, 9, ignore_eos=True)
    bench.drain().check_outputs()
    usage = bench.last("a").usage
    assert usage is not None
    assert usage.accepted_prediction_tokens == usage.accepted_tokens
    assert usage.rejected_prediction_tokens == usage.drafted_tokens - usage.accepted_tokens > 0


def test_accepted_tokens_behind_the_end_are_not_counted() -> None:
    bench = Bench(good_guess, budget=8)
    for i in range(30):
        bench.add(f"r{i}", 4 + i % 7, 40)
    bench.drain().check_outputs()
    for request_id in bench.requests:
        usage = bench.last(request_id).usage
        assert usage is not None
        generated = len(bench.tokens(request_id))
        assert generated - usage.steps <= usage.accepted_tokens <= generated
    stats = bench.engine.stats()
    assert stats.num_accepted_tokens == sum(bench.last(request_id).usage.accepted_tokens for request_id in bench.requests)  # type: ignore[union-attr]
    assert stats.num_accepted_tokens == sum(stats.num_accepted_tokens_per_pos)
    assert stats.num_draft_tokens > stats.num_accepted_tokens  # some ended in the middle of a draft
    assert stats.generation_tokens == sum(len(bench.tokens(request_id)) for request_id in bench.requests)


def test_an_error_ends_one_sequence_and_nobody_starts_from_its_blocks() -> None:
    bench = Bench(budget=0)
    bench.add("bad", list(range(2, 23)), 30, ignore_eos=True)
    bench.add("good", 9, 10)
    bench.step()
    bench.step()
    bench.executor.fail.add("bad")
    bench.step()
    delta = bench.last("bad")
    assert (delta.finish_reason, delta.error, delta.token_ids) == ("error", "not a number", [])
    assert delta.usage is not None
    assert bench.running() == ["good"]
    bench.drain()
    del bench.requests["bad"]
    bench.add("again", list(range(2, 23)), 3)
    bench.drain().check_outputs()
    assert bench.last("again").usage.cached_tokens == 0  # type: ignore[union-attr]
    assert bench.engine.stats().corrupted_requests == 1


def test_the_siblings_of_a_first_sample_that_fails_get_their_own_end() -> None:
    bench = Bench(max_num_batched_tokens=8)
    bench.add("a", 30, 5, n=3)
    bench.step()
    bench.executor.fail.add("a")
    bench.step()
    bench.executor.fail.clear()
    bench.drain()
    assert bench.last("a", 0).finish_reason == "error"
    for index in (1, 2):
        expected = rollout(bench.requests["a"], index)
        assert bench.tokens("a", index) == expected.tokens[expected.num_prompt :]
    assert bench.engine.pool.is_idle()


@pytest.mark.parametrize("state", ["unknown", "waiting", "prompt", "decoding", "preempted", "finished", "sibling", "unborn"])
def test_abort_in_every_state_frees_the_blocks_at_once(state: str) -> None:
    bench = Bench(budget=2, num_blocks=12, max_model_len=48, max_num_batched_tokens=16)
    bench.add("other", 6, 20, ignore_eos=True)
    bench.step()
    if state == "waiting":
        bench.add("x", 44, 4)
    elif state == "prompt":
        bench.add("x", 24, 4)
        bench.step()
        assert bench.scheduler.running[1].seq.num_uncomputed > 1
    elif state == "decoding":
        bench.add("x", 6, 9, ignore_eos=True)
        bench.step()
    elif state == "preempted":
        bench.add("x", 6, 30, priority=3, ignore_eos=True)
        bench.step()
        bench.add("first", 30, 4, priority=1)
        bench.step()
        assert bench.waiting() == ["x"]
    elif state == "finished":
        bench.add("x", 3, 1)
        bench.step()
    elif state in ("sibling", "unborn"):
        bench.add("x", 20, 4, n=3, ignore_eos=True)
        bench.step()
        if state == "sibling":
            bench.step()
            bench.step()
    deltas = len(bench.deltas["x", 0])
    bench.engine.abort("x")
    bench.engine.abort("x")
    assert "x" not in bench.running() + bench.waiting()
    assert bench.scheduler.num_waiting == 0
    held = [block for entry in bench.scheduler.running for block in entry.seq.block_ids]
    assert bench.engine.pool.num_used == len(set(held))
    bench.requests.pop("x", None)
    bench.drain().check_outputs()
    assert len(bench.deltas["x", 0]) == deltas


def test_an_aborted_id_can_be_used_again_at_once() -> None:
    bench = Bench()
    bench.add("a", 9, 20)
    bench.step()
    bench.engine.abort("a")
    bench.deltas.clear()
    bench.add("a", 7, 5)
    bench.drain().check_outputs()


def test_workers_are_told_to_forget_whoever_left() -> None:
    bench = Bench(budget=0)
    bench.add("a", 5, 2, ignore_eos=True)
    bench.add("b", 5, 8, ignore_eos=True)
    bench.add("never admitted", 5, 8)
    bench.engine.abort("never admitted")
    bench.step()
    bench.step()
    assert bench.step().removed == [0]
    bench.engine.abort("b")
    bench.add("c", 5, 2, ignore_eos=True)
    assert bench.step().removed == [1]
    bench.drain()
    assert set(bench.executor.seqs) == {3}


def test_an_id_in_use_is_refused() -> None:
    bench = Bench()
    bench.add("a", 5, 2)
    with pytest.raises(ValueError, match="request_id: 'a' is already running"):
        bench.engine.add(make_request("a", 4, 2))
    bench.drain().check_outputs()


# ---- results that do not answer the plan


class Broken(FakeExecutor):
    """Answers every plan with the given rows."""

    def __init__(self, rows: list[RowResult]) -> None:
        super().__init__()
        self.rows = rows

    def execute(self, plan: StepPlan) -> StepResult:
        return StepResult(self.rows, StepTimes())


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [RowResult(0, [5]), RowResult(1, [5])],
        [RowResult(1, [5])],  # somebody else's
        [RowResult(0, [])],  # reached its root and was not judged
        [RowResult(0, [5, 6, 7, 8])],  # more accepted than was allowed to be drafted
    ],
)
def test_a_result_that_does_not_answer_the_plan_is_an_error(rows: list[RowResult]) -> None:
    engine = Engine(EngineConfig(model="fake", policy="fixed", budget=2), Broken(rows))
    engine.add(make_request("a", 5, 9))
    with pytest.raises(RuntimeError):
        engine.step()


def test_a_sequence_that_left_during_the_step_is_passed_over() -> None:
    bench = Bench(budget=0)
    bench.add("a", 5, 9)
    bench.add("b", 5, 9, ignore_eos=True)
    plan = bench.scheduler.schedule()
    assert plan is not None
    bench.engine.abort("a")
    result = bench.executor.execute(plan)
    deltas = bench.scheduler.commit(plan, result)
    assert [delta.request_id for delta in deltas] == ["b"]
    bench.engine.abort("b")
    assert bench.engine.pool.is_idle()


def test_an_idle_scheduler_plans_nothing() -> None:
    bench = Bench()
    assert bench.scheduler.schedule() is None
    assert bench.engine.step() == []
    bench.scheduler.check_integrity()


@pytest.mark.parametrize("field", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_limits_that_let_nothing_run_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Bench(**{field: 0})


def test_the_prompt_is_not_walked_through_at_every_step() -> None:
    """The plan of a decoding step carries new blocks only, and the sequence's list of tokens stays the same object."""
    bench = Bench(budget=0, num_blocks=400, max_model_len=1600, max_num_batched_tokens=1600)
    bench.add("a", 1000, 40, ignore_eos=True)
    bench.step()
    seq: Sequence = bench.scheduler.running[0].seq
    tokens, table = seq.tokens, seq.block_ids
    sent = [len(bench.step().rows[0].block_ids) for _ in range(30)]
    assert set(sent) == {0, 1}
    assert seq.tokens is tokens
    assert seq.block_ids is table
