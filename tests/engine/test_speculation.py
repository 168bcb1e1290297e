"""What a request asks of speculation is honoured or refused; what cut a budget is told."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.messages import SequenceUsage
from engine.request import Request, Speculation
from tests.fakes import FakeExecutor, fake_info, garbage, good_guess, make_request, rollout


def run(request: Request, guess: Any = good_guess, **info: object) -> tuple[SequenceUsage, FakeExecutor]:
    """The request's usage, alone in an engine that drafts 4 nodes; its tokens are plain decoding's."""
    executor = FakeExecutor(fake_info(**info), guess)
    engine = Engine(EngineConfig(model="fake", policy="fixed", budget=4, check_integrity=True), executor)
    engine.add(request)
    tokens: list[int] = []
    usage = None
    while engine.has_work():
        for delta in engine.step():
            tokens += delta.token_ids
            usage = delta.usage or usage
    expected = rollout(request)
    assert tokens == expected.tokens[expected.num_prompt :]
    assert usage is not None
    return usage, executor


def wish(max_tokens: int = 12, **wishes: Any) -> Request:
    return msgspec.structs.replace(make_request("a", 5, max_tokens, ignore_eos=True), speculation=Speculation(**wishes))


def test_off_is_plain_decoding() -> None:
    usage, executor = run(wish(off=True))
    assert usage.steps == 12 and usage.drafted_tokens == 0 and usage.budget_reasons == {"off": 12}
    assert all(row.budget == 0 for plan in executor.plans for row in plan.rows)


def test_max_nodes_is_the_most_nodes_of_a_step() -> None:
    usage, executor = run(wish(max_nodes=2))
    assert max(row.budget for plan in executor.plans for row in plan.rows) == 2
    assert usage.steps == 4 and usage.budget_reasons == {"max_nodes": 3, "max_tokens": 1}
    assert run(wish(max_nodes=0))[0].budget_reasons == {"max_nodes": 11, "max_tokens": 1}
    assert "max_nodes" not in run(wish(max_nodes=99))[0].budget_reasons


def test_the_end_of_a_request_limits_its_budget() -> None:
    usage, _ = run(wish(max_tokens=7))
    assert usage.steps == 2 and usage.budget_reasons == {"max_tokens": 1}  # 5 and then 2 of them


def test_blocks_limit_a_budget() -> None:
    usage, _ = run(wish(max_tokens=10), num_blocks=4, block_size=4, max_model_len=16)
    assert usage.budget_reasons.get("blocks", 0) > 0


def test_a_limit_that_was_not_reached_is_no_reason() -> None:
    usage, _ = run(wish(max_tokens=40, max_nodes=3), lambda truth, budget, rng: ([1], [0]) if budget else ([], []))
    assert usage.steps > 10 and usage.budget_reasons.get("max_nodes", 0) == 0


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"drafters": ["ngrm"]}, "speculation.drafter: 'ngrm' is not configured; there is fake"),
        ({"max_nodes": -1}, "speculation.max_nodes: must be 0 or more"),
        ({"verifier": "typical"}, "speculation.verifier: 'typical' cannot be chosen; there is match"),
    ],
)
def test_what_cannot_be_had_is_refused(wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        run(wish(**wishes))
    assert str(caught.value) == message


def test_what_can_be_had_is_accepted() -> None:
    run(wish(drafters=["fake"], max_nodes=1, verifier="match"), garbage)
    run(wish(verifier="block"), verifiers=["block", "match"])
    run(wish(drafters=[]))
