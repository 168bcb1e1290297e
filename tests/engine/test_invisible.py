"""Speculation never changes an answer: for every drafter, parameter, batch and preemption the token ids are the same.

float32 on a CPU, same seed: exact equality, no tolerance on token ids. The reference is each request alone, undrafted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from engine.protocols import Drafter
from engine.request import Request
from engine.worker import Worker
from tests.engine.real import Answer, GarbageDrafter, OracleDrafter, WhimsicalPolicy, answers, load_worker, make_engine, request

MAX_TOKENS = 20
# A text that repeats itself, so that n-gram drafts are accepted, long and rejected, all of it.
TEXT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n    return a"
PREDICTION = " * b\n\ndef div(a, b):\n    return a / b\n\ndef pow(a, b):\n    return a ** b\n"

PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.5},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all filters": {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.3},
    "presence": {"temperature": 0.0, "presence_penalty": 1.5},
    "frequency": {"temperature": 0.8, "frequency_penalty": 1.0},
    "logit_bias": {"temperature": 0.0, "logit_bias": {28: 5.0, 260: -100.0}},
    "allowed": {"temperature": 1.0, "allowed_token_ids": list(range(200, 460))},
    "bad_words": {"temperature": 0.0, "bad_words": [[28], [198, 198], [260, 29]]},
    "min_tokens": {"temperature": 1.2, "min_tokens": 12, "stop_token_ids": [198, 28, 30]},
    "stop ids": {"temperature": 0.0, "stop_token_ids": [30, 42]},
    "ignore_eos": {"temperature": 1.0, "ignore_eos": True},
    "logprobs": {"temperature": 0.6, "logprobs": 3},
    "prompt_logprobs": {"temperature": 0.0, "prompt_logprobs": 2, "logprobs": 0},
    "samples": {"temperature": 1.0, "n": 3},
}


@pytest.fixture(scope="module")
def worker(smollm2_dir: Path) -> Worker:
    return load_worker(smollm2_dir, block_size=8)


@pytest.fixture(scope="module")
def requests(smollm2_dir: Path) -> list[Request]:
    return make_requests(smollm2_dir)


def make_requests(smollm2_dir: Path) -> list[Request]:
    """One request per set of parameters, all over the same prompt and prediction."""
    tokenizer = Tokenizer.from_file(str(smollm2_dir / "tokenizer.json"))
    prompt, prediction = tokenizer.encode(TEXT).ids, tokenizer.encode(PREDICTION).ids
    return [
        request(name, prompt, max_tokens=MAX_TOKENS, seed=7 + i, prediction_ids=prediction, **params)
        for i, (name, params) in enumerate(PARAMETERS.items())
    ]


@pytest.fixture(scope="module")
def alone(worker: Worker, requests: list[Request]) -> dict[tuple[str, int], Answer]:
    """Each request by itself, undrafted, on an empty cache."""
    out: dict[tuple[str, int], Answer] = {}
    for one in requests:
        out |= answers(make_engine(worker), [one])
    return out


def drafter(name: str, worker: Worker, alone: dict[tuple[str, int], Answer]) -> list[str | Drafter]:
    vocab = worker.info.vocab_size
    oracle = OracleDrafter(vocab, {key: answer.tokens for key, answer in alone.items()})
    made: dict[str, list[str | Drafter]] = {
        "none": [],
        "ngram": ["ngram"],
        "prediction": ["prediction"],
        "both": ["prediction", "ngram"],
        "garbage": [GarbageDrafter(vocab)],
        "oracle": [oracle],
        "all": ["prediction", "ngram", oracle, GarbageDrafter(vocab)],
    }
    return made[name]


def assert_same(found: dict[tuple[str, int], Answer], alone: dict[tuple[str, int], Answer]) -> None:
    for key, answer in found.items():
        expected = alone[key]
        assert answer.tokens == expected.tokens, key
        assert answer.finish_reason == expected.finish_reason, key
        for ours, theirs in (
            (answer.logprobs, expected.logprobs),
            (answer.prompt_logprobs or [], expected.prompt_logprobs or []),
        ):
            assert len(ours) == len(theirs), key
            for one, other in zip(ours, theirs, strict=True):
                assert (one is None) == (other is None), key
                if one is not None and other is not None:
                    assert one.logprob == pytest.approx(other.logprob, abs=1e-3), key
                    assert [token for token, _ in one.top] == [token for token, _ in other.top], key


LONG = pytest.mark.long  # in a batch and after preemption these two are of every run


@pytest.mark.parametrize(
    "name", ["ngram", "prediction", pytest.param("both", marks=LONG), pytest.param("garbage", marks=LONG), "oracle"]
)
def test_alone_with_drafts(name: str, worker: Worker, requests: list[Request], alone: dict[tuple[str, int], Answer]) -> None:
    """Batch of one: every request by itself, speculating."""
    drafted = 0
    for one in requests:
        engine = make_engine(worker, drafter(name, worker, alone))
        assert_same(answers(engine, [one]), alone)
        drafted += engine.stats().num_draft_tokens
    assert drafted > 0


@pytest.mark.parametrize("name", ["none", "ngram", "prediction", "both", "garbage", "oracle"])
def test_in_a_batch(name: str, worker: Worker, requests: list[Request], alone: dict[tuple[str, int], Answer]) -> None:
    """Batches of eight, each request with other parameters, sharing a cached prefix and small prompt chunks."""
    engine = make_engine(worker, drafter(name, worker, alone))
    found: dict[tuple[str, int], Answer] = {}
    for first in range(0, len(requests), 8):
        found |= answers(engine, requests[first : first + 8])
    assert found.keys() == alone.keys()
    assert_same(found, alone)


@pytest.mark.parametrize("name", ["none", "both", "garbage", "oracle"])
def test_after_preemption(name: str, worker: Worker, requests: list[Request], alone: dict[tuple[str, int], Answer]) -> None:
    """A pool that holds about three of the sequences: others are thrown out and computed again."""
    engine = make_engine(worker, drafter(name, worker, alone), num_blocks=20, enable_prefix_caching=False)
    found = answers(engine, requests)
    assert engine.stats().preemptions > 0
    assert found.keys() == alone.keys()
    assert_same(found, alone)


@pytest.mark.parametrize("seed", range(3))
def test_while_the_policy_changes_its_mind(
    seed: int, worker: Worker, requests: list[Request], alone: dict[tuple[str, int], Answer]
) -> None:
    """Budgets, drafters and drops at random: trees of several drafters are fused and cut, in a pool that preempts."""
    policy = WhimsicalPolicy(seed=seed)
    engine = make_engine(worker, drafter("all", worker, alone), policy=policy, num_blocks=28 if seed else None)
    assert_same(answers(engine, requests), alone)
    stats = engine.stats()
    assert policy.dropped > 50 and policy.fused > 50 and stats.num_accepted_tokens > 50
    assert (stats.preemptions > 0) == bool(seed)
    assert len(stats.accepted_tokens_by_drafter) > 1


@pytest.mark.parametrize("batch", [1, 8])
def test_under_goodput(batch: int, worker: Worker, requests: list[Request], alone: dict[tuple[str, int], Answer]) -> None:
    """The real controller over everything at once, with costs that it only guesses at."""
    engine = make_engine(worker, drafter("all", worker, alone), policy="goodput", max_budget=12)
    found: dict[tuple[str, int], Answer] = {}
    for first in range(0, len(requests), batch):
        found |= answers(engine, requests[first : first + batch])
    assert found.keys() == alone.keys()
    assert_same(found, alone)
    stats = engine.stats()
    assert stats.num_accepted_tokens > 0 and stats.predicted_seconds > 0 and not stats.drafter_fallbacks
    usage = next(iter(found.values())).usage
    assert usage is not None and sum(usage.budget_reasons.values()) == usage.steps


def test_an_accepted_draft_saves_steps(worker: Worker, requests: list[Request], alone: dict[tuple[str, int], Answer]) -> None:
    """The oracle's trees are really verified several tokens at a time, or the tests above would prove nothing."""
    engine = make_engine(worker, drafter("oracle", worker, alone), budget=8)
    usage = answers(engine, [requests[0]])["greedy", 0].usage
    assert usage is not None and usage.accepted_tokens > 0 and usage.steps <= MAX_TOKENS / 2
