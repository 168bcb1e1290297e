"""The draft model is invisible, and as good as it can be: drafting with the target itself, everything it drafts is accepted.

That holds only while positions, noise and every key and value in its cache are right, so it is asked after prefix hits,
preemptions, times without drafts, aborts and the reuse of blocks. float32, so that equal means equal.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from engine.engine import Engine
from engine.messages import TokenDelta
from engine.request import Request
from engine.sequence import Sequence
from engine.tree import DraftForest
from engine.worker import Worker
from tests.engine.models import tiny
from tests.engine.pairs import (
    BLOCK,
    Pair,
    alone,
    alternate,
    drafter_of,
    engine_config,
    make_engine,
    make_requests,
    plan_budgets,
    tokens,
    write_pair,
)
from tests.engine.real import answers, request

CHAIN = {"branches": 1, "least": 0.0}
TREES: list[dict[str, Any]] = [CHAIN, {}, {"branches": 4, "width": 3, "least": 0.0}, {"branches": 2, "width": 2}]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests()


@pytest.fixture(scope="module")
def expected(pair: Pair, requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    return alone(pair.target, requests)


def counts(engine: Engine) -> tuple[int, int]:
    """Draft nodes shown and accepted so far; nothing may have gone wrong on the way."""
    stats = engine.stats()
    assert stats.drafter_fallbacks == {}
    return stats.num_draft_tokens, stats.num_accepted_tokens


def assert_all_accepted(engine: Engine) -> None:
    drafted, accepted = counts(engine)
    assert accepted == drafted > 0


# ---- invisible


@pytest.mark.parametrize("drafting", TREES)
def test_alone_and_in_a_batch(
    drafting: dict[str, Any], pair: Pair, requests: list[Request], expected: dict[tuple[str, int], list[int]]
) -> None:
    engine = make_engine(pair.target, pair.draft, drafting)
    for one in requests:
        assert tokens(answers(engine, [one])).items() <= expected.items()
    # Again, all at once: the prompts lie in the prefix cache now.
    assert tokens(answers(engine, requests)) == expected
    drafted, accepted = counts(engine)
    assert 0 < accepted < drafted


@pytest.mark.parametrize("drafting", TREES)
def test_while_the_budget_comes_and_goes(
    drafting: dict[str, Any], pair: Pair, requests: list[Request], expected: dict[tuple[str, int], list[int]]
) -> None:
    engine = make_engine(pair.target, pair.draft, drafting, max_num_batched_tokens=48)
    alternate(engine)
    assert tokens(answers(engine, requests)) == expected
    assert counts(engine)[1] > 0


@pytest.mark.parametrize("caching", [False, True])
def test_after_preemption(caching: bool, pair: Pair, requests: list[Request], expected: dict[tuple[str, int], list[int]]) -> None:
    engine = make_engine(
        pair.target, pair.draft, kv_cache_memory_bytes=20 * block_bytes(pair), enable_prefix_caching=caching, max_model_len=80
    )
    assert engine.info.num_blocks == 20
    assert tokens(answers(engine, requests)) == expected
    assert engine.stats().preemptions > 0
    assert counts(engine)[1] > 0


def block_bytes(pair: Pair) -> int:
    info = make_engine(pair.target, pair.draft).info
    return info.kv_bytes // info.num_blocks


# ---- as good as it can be


@pytest.mark.parametrize("drafting", [CHAIN, {"branches": 1, "width": 2, "least": 0.0}])
def test_the_target_as_its_own_draft_is_always_right(
    drafting: dict[str, Any], pair: Pair, requests: list[Request], expected: dict[tuple[str, int], list[int]]
) -> None:
    engine = make_engine(pair.target, pair.target, drafting)
    assert tokens(answers(engine, requests)) == expected
    assert_all_accepted(engine)
    # Prefix hits, on blocks that it filled itself.
    assert tokens(answers(engine, requests)) == expected
    assert_all_accepted(engine)


def test_trees_of_the_target_itself_always_hold_its_token(pair: Pair, requests: list[Request]) -> None:
    engine = make_engine(pair.target, pair.target, {"branches": 3, "least": 0.0})
    answers(engine, requests)
    stats = engine.stats()
    assert stats.num_drafts > 0 and stats.num_accepted_tokens_per_pos[0] == stats.num_drafts


def test_right_on_prefixes_that_it_never_read(pair: Pair, requests: list[Request]) -> None:
    """The target filled the cache while drafting was off; other sequences meet in the same blocks afterwards."""
    engine = make_engine(pair.target, pair.target, CHAIN)
    plan_budgets(engine, lambda step, seqs: [0] * len(seqs))
    answers(engine, requests)
    assert counts(engine) == (0, 0)
    plan_budgets(engine, lambda step, seqs: [5] * len(seqs))
    found = answers(engine, requests)
    assert sum(answer.usage.cached_tokens for answer in found.values() if answer.usage) > 0
    assert_all_accepted(engine)


def test_right_after_preemption(pair: Pair, requests: list[Request], expected: dict[tuple[str, int], list[int]]) -> None:
    engine = make_engine(
        pair.target, pair.target, CHAIN, kv_cache_memory_bytes=20 * 2 * 4096, max_model_len=80, max_num_batched_tokens=40
    )
    assert engine.info.num_blocks == 20
    assert tokens(answers(engine, requests)) == expected
    assert engine.stats().preemptions > 0
    assert_all_accepted(engine)


@pytest.mark.parametrize("seed", range(3))
def test_right_after_times_without_drafts(
    seed: int, pair: Pair, requests: list[Request], expected: dict[tuple[str, int], list[int]]
) -> None:
    engine = make_engine(pair.target, pair.target, CHAIN, max_num_batched_tokens=48)
    alternate(engine, seed)
    assert tokens(answers(engine, requests)) == expected
    assert_all_accepted(engine)


def test_right_in_blocks_that_others_left(pair: Pair) -> None:
    """Requests come, are aborted in any state and leave their blocks to others, in a pool that holds three of them."""
    rng = np.random.default_rng(5)
    waves = [make_requests(seed, max_tokens=20, length=30) for seed in range(6)]
    everyone = [one for wave in waves for one in wave]
    named = [request(f"w{i}", one.prompt_ids, **_params(one)) for i, one in enumerate(everyone)]
    expected = alone(pair.target, named)
    engine = make_engine(pair.target, pair.target, CHAIN, kv_cache_memory_bytes=18 * 2 * 4096, max_model_len=64)
    alternate(engine, 3)
    gone: set[str] = set()
    deltas: list[TokenDelta] = []
    waiting = list(named)
    while waiting or engine.has_work():
        if waiting and rng.random() < 0.5:
            engine.add(waiting.pop())
        if rng.random() < 0.1 and (live := [entry.seq.request.request_id for entry in engine.scheduler.running]):
            gone.add(victim := str(rng.choice(live)))
            engine.abort(victim)
        deltas += engine.step()
    found: dict[tuple[str, int], list[int]] = {}
    for delta in deltas:
        found.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
    assert gone and len(gone) < len(named)
    assert all(found[key] == value for key, value in expected.items() if key[0] not in gone)
    assert_all_accepted(engine)


def test_right_when_a_text_returns_to_a_block_that_another_wrote_into(pair: Pair) -> None:
    """Block by block the same beginning, and a block that was whole, half overwritten, and is asked for again."""
    engine = make_engine(pair.target, pair.target, CHAIN, enable_prefix_caching=False)
    begin = list(range(10, 10 + 3 * BLOCK))
    whole = request("whole", [*begin, *range(40, 40 + BLOCK), 5], max_tokens=12, temperature=0.0, ignore_eos=True)
    half = request("half", [*begin, 70, 71], max_tokens=4, temperature=0.0, ignore_eos=True)
    for one in (whole, half, whole):
        answers(engine, [one])
    assert_all_accepted(engine)


def test_a_text_that_lies_there_whole_is_drafted_for_at_once(pair: Pair) -> None:
    """All its blocks hold it already; the root is read again, for its logits."""
    engine = make_engine(pair.target, pair.target, CHAIN, enable_prefix_caching=False)
    one = request("a", list(range(10, 10 + 2 * BLOCK)), max_tokens=12, temperature=0.0, ignore_eos=True)
    answers(engine, [one])
    first = counts(engine)
    answers(engine, [one])
    assert counts(engine) == (2 * first[0], 2 * first[1])


def _params(one: Request) -> dict[str, Any]:
    p = one.params
    return {name: getattr(p, name) for name in p.__struct_fields__}


Drafts = dict[tuple[str, int], tuple[list[int], list[int]]]


def record(engine: Engine) -> Drafts:
    """(request, tokens out) -> what is drafted there, tokens and parents, from now on."""
    drafter, found = drafter_of(engine), {}
    real = drafter.draft

    def draft(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        forest: DraftForest = real(seqs, budgets)
        for b, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            if forest.size(b) > 1 and budget == 4:
                part = forest.nodes(b)
                found[seq.request.request_id, seq.num_output] = forest.token[part].tolist(), forest.parent[part].tolist()
        return forest

    drafter.draft = draft
    return found


@pytest.mark.parametrize("drafting", [CHAIN, {"branches": 2, "width": 2, "least": 0.0}])
def test_after_a_spike_and_a_drain_the_same_is_drafted(drafting: dict[str, Any], pair: Pair) -> None:
    """A worse draft model: drafts, a spike during which there are none, a drain. Wherever the runs meet, they draft the same."""

    def run(spike: bool) -> Drafts:
        engine = make_engine(pair.target, pair.draft, drafting)
        for one in make_requests(11, max_tokens=80, length=12):
            engine.add(one)
        off = range(8, 30) if spike else range(0)
        plan_budgets(engine, lambda step, seqs: [0 if step in off else 4] * len(seqs))
        for step in range(30):
            if step == 8 and spike:
                for one in make_requests(12, max_tokens=20):
                    engine.add(request(f"spike {one.request_id}", one.prompt_ids, **_params(one)))
            engine.step()
        found = record(engine)
        while engine.has_work():
            engine.step()
        assert counts(engine)[1] > 0
        return found

    spike, calm = run(True), run(False)
    met = spike.keys() & calm.keys()
    assert len(met) > 50
    assert all(spike[key] == calm[key] for key in met)


def test_the_batch_does_not_matter(pair: Pair) -> None:
    """Alone or among seven others: the same drafts, so the same acceptance."""
    requests = make_requests(13, max_tokens=40)
    together, alone = make_engine(pair.target, pair.draft), make_engine(pair.target, pair.draft)
    in_batch, by_itself = record(together), record(alone)
    plan_budgets(together, lambda step, seqs: [4] * len(seqs))
    plan_budgets(alone, lambda step, seqs: [4] * len(seqs))
    answers(together, requests)
    for one in requests:
        answers(alone, [one])
    met = in_batch.keys() & by_itself.keys()
    assert len(met) > 50
    assert all(in_batch[key] == by_itself[key] for key in met)


# ---- catching up


def test_a_long_prompt_is_caught_up_in_pieces(pair: Pair) -> None:
    """No step feeds the draft model more than its limit, and drafts begin when it is there."""
    engine = make_engine(pair.target, pair.target, CHAIN, max_num_batched_tokens=512)
    drafter = drafter_of(engine)
    drafter._pace.limit = drafter._pace._most = 32
    fed: list[int] = []
    real = drafter._model.forward

    def forward(seqs: Any, rows: Any, forest: Any, trees: Any) -> torch.Tensor:
        fed.append(sum(row.num_new for row in rows) + forest.num_drafts)
        return real(seqs, rows, forest, trees)

    drafter._model.forward = forward
    one = request("long", [3 + i * 7 % 90 for i in range(100)], max_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
    engine.add(one)
    engine.step()
    seq = next(iter(engine.executor._worker.seqs.values()))  # type: ignore[attr-defined]  # a LocalExecutor
    assert counts(engine) == (0, 0) and drafter.backlog(seq) == 68  # 32 of 101 tokens are read, the root does not count
    while engine.has_work():
        engine.step()
    assert max(fed) == 32
    assert_all_accepted(engine)


def test_who_is_up_to_date_drafts_beside_who_is_not(pair: Pair) -> None:
    engine = make_engine(pair.target, pair.target, CHAIN)
    drafter_of(engine)._pace.limit = drafter_of(engine)._pace._most = 16
    engine.add(request("short", [5, 6, 7], max_tokens=30, temperature=0.0, ignore_eos=True))
    engine.step()
    engine.add(request("long", [3 + i * 7 % 90 for i in range(90)], max_tokens=10, temperature=0.0, ignore_eos=True))
    for _ in range(3):
        before = counts(engine)
        engine.step()
        assert counts(engine)[0] >= before[0] + 5
    while engine.has_work():
        engine.step()
    assert_all_accepted(engine)


def test_a_long_text_is_not_read_for_a_few_tokens(pair: Pair) -> None:
    engine = make_engine(pair.target, pair.target, CHAIN)
    prompt = [3 + i * 7 % 90 for i in range(100)]
    answers(engine, [request("few", prompt, max_tokens=6, temperature=0.0, ignore_eos=True)])
    assert counts(engine)[0] == 0
    answers(engine, [request("more", prompt[1:], max_tokens=20, temperature=0.0, ignore_eos=True)])
    assert_all_accepted(engine)


# ---- what cannot work


def test_a_text_beyond_the_draft_models_length_is_decoded_plainly(pair: Pair, tmp_path: Path) -> None:
    made = tiny.model(tiny.config("Llama", max_position_embeddings=32, num_hidden_layers=1))
    short = tiny.save(made, tmp_path / "short")
    one = request("a", list(range(3, 23)), max_tokens=40, temperature=0.0, ignore_eos=True)
    engine = make_engine(pair.target, short)
    assert tokens(answers(engine, [one])) == alone(pair.target, [one])
    assert counts(engine)[0] > 0


def test_a_draft_model_that_fails_on_a_text_leaves_it_and_the_others_alone(
    pair: Pair, requests: list[Request], expected: dict[tuple[str, int], list[int]]
) -> None:
    engine = make_engine(pair.target, pair.target, CHAIN)
    drafter = drafter_of(engine)
    real, calls = drafter._model.forward, 0

    def forward(seqs: Any, rows: Any, forest: Any, trees: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        logits = real(seqs, rows, forest, trees)
        if calls == 3:
            logits[0] = float("nan")
            drafter._model.runner.kv.kv[:, seqs[0].block_ids[-1]] = float("nan")
        return logits

    drafter._model.forward = forward
    assert tokens(answers(engine, requests)) == expected
    assert torch.isfinite(drafter._model.runner.kv.kv).all(), "the next owner of these blocks would read NaN behind its mask"
    assert_all_accepted(engine)


def test_a_draft_model_that_raises_costs_the_step(pair: Pair, requests: list[Request]) -> None:
    engine = make_engine(pair.target, pair.target, CHAIN)
    drafter = drafter_of(engine)
    real, calls = drafter._model.forward, 0

    def forward(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise RuntimeError("out of memory")
        return real(*args)  # type: ignore[no-any-return]

    drafter._model.forward = forward
    assert tokens(answers(engine, requests)) == alone(pair.target, requests)
    stats = engine.stats()
    assert stats.drafter_fallbacks["raised"] > 0
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"drafters": ["draft_model"], "draft_model": None}, "--draft-model"),
        ({"drafters": ["ngram"]}, "none of the drafters uses it"),
    ],
)
def test_a_model_and_a_drafter_belong_together(options: dict[str, Any], said: str, pair: Pair) -> None:
    config = msgspec.structs.replace(engine_config(pair.target, pair.draft), **options)
    with pytest.raises(ValueError, match=said):
        Worker(config)


def test_a_depth_is_timed_at_start_and_the_cost_model_starts_from_it(pair: Pair) -> None:
    engine = make_engine(pair.target, pair.draft, policy="goodput")
    seconds = engine.info.depth_seconds["draft_model"]
    assert 0 < seconds < 10
    assert engine.costs is not None
    assert engine.costs.model.draft_seconds("draft_model", 1, 4) == pytest.approx(4 * seconds)
    assert make_engine(pair.target).info.depth_seconds == {}


def test_paths_that_cost_more_than_they_promise_are_not_followed(pair: Pair, requests: list[Request]) -> None:
    """Every depth is a forward: where it costs much of a step, drafts stop where the draft model is unsure."""

    def forwards(price: float) -> float:
        """Per step."""
        engine, calls = make_engine(pair.target, pair.target), 0
        engine.policy.depth_price = lambda drafter, sequences: price  # type: ignore[method-assign]
        model = drafter_of(engine)._model
        real = model.forward

        def forward(*args: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return real(*args)  # type: ignore[no-any-return]

        model.forward = forward
        answers(engine, requests)
        return calls / engine.stats().steps

    assert forwards(0.45) < forwards(0.0) - 0.5


def test_both_models_are_in_the_memory_plan(pair: Pair) -> None:
    plain, both = make_engine(pair.target).info, make_engine(pair.target, pair.draft).info
    per_layer = 2 * 2 * 8 * 16 * 4  # keys and values, heads, tokens, head size, float32
    assert plain.kv_bytes // plain.num_blocks == 2 * per_layer
    assert both.kv_bytes // both.num_blocks == 3 * per_layer
    assert both.kv_bytes <= 1 << 20
    assert both.weight_bytes > plain.weight_bytes
