"""Two ranks give the token ids that one gives: every drafter, alone, in a batch, after preemption, sampled and greedy.

float32 over gloo on a CPU, tiny random models; every step compares the ranks' sequences and block tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from engine import datastore
from engine.engine import Engine
from engine.executors.multiproc import MultiprocExecutor
from engine.probe import Probe, run_probe
from engine.registry import DRAFTERS, make_drafter
from engine.request import Request
from engine.worker import Worker
from tests.engine import pairs
from tests.engine.models import tiny
from tests.engine.pairs import alternate, engine_config, make_requests, tokens
from tests.engine.real import WhimsicalPolicy, answers, make_engine, request
from tests.engine.test_invisible import make_requests as real_requests

Tokens = dict[tuple[str, int], list[int]]

NAMES = sorted(set(DRAFTERS) - {"draft_model", "none"})
SETS = {name: [name] for name in NAMES} | {"all": NAMES}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> pairs.Pair:
    return pairs.write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return make_requests(max_tokens=32)


@pytest.fixture(scope="module")
def alone(pair: pairs.Pair, requests: list[Request]) -> Tokens:
    """One rank, each request by itself, undrafted."""
    return pairs.alone(pair.target, requests)


@pytest.fixture(scope="module")
def worker(pair: pairs.Pair) -> Iterator[Worker]:
    """Rank 0 of two."""
    executor = MultiprocExecutor(engine_config(pair.target, tensor_parallel_size=2))
    yield executor._worker
    executor.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, alone: Tokens) -> Path:
    path = tmp_path_factory.mktemp("store") / "texts"
    datastore.build(path, list(alone.values())[::2], tiny.SHAPE["vocab_size"], b"f" * 32)
    return path


def assert_same(found: Tokens, alone: Tokens) -> None:
    assert found.keys() == alone.keys()
    for key, ids in found.items():
        assert ids == alone[key], key


@pytest.mark.parametrize("name", SETS)
def test_every_drafter(name: str, worker: Worker, requests: list[Request], alone: Tokens, store: Path) -> None:
    """In a batch, with prefix hits; then with few blocks, so that sequences are preempted, and budgets that change at random."""
    offers = {"vocab_size": worker.info.vocab_size, "eos_ids": frozenset(worker.info.eos_ids), "datastore": str(store)}

    def drafters() -> list[Any]:
        return [make_drafter(one, offers) for one in SETS[name]]

    guesses = [list(alone[one.request_id, 0]) for one in requests]
    for guess in guesses:
        guess[12] = 2
    asked = [msgspec.structs.replace(one, prediction_ids=guess) for one, guess in zip(requests, guesses, strict=True)]
    engine = make_engine(worker, drafters(), budget=7, max_num_batched_tokens=64)
    assert_same(tokens(answers(engine, asked)), alone)
    stats = engine.stats()
    assert stats.num_accepted_tokens > 0 and not stats.drafter_fallbacks
    engine = make_engine(worker, drafters(), budget=7, num_blocks=24, enable_prefix_caching=False)
    alternate(engine, seed=3, most=7)
    assert_same(tokens(answers(engine, asked)), alone)
    assert engine.stats().preemptions > 0


def test_fused_and_trimmed_trees(worker: Worker, requests: list[Request], alone: Tokens) -> None:
    """What the policy does to the forest is rank 0's to know."""
    policy = WhimsicalPolicy()
    engine = make_engine(worker, ["suffix", "token_recycling", "ngram"], policy=policy)
    assert_same(tokens(answers(engine, requests)), alone)
    assert policy.dropped and policy.fused


def test_logprobs_of_answers_and_prompts(pair: pairs.Pair, worker: Worker) -> None:
    asked = [request(f"r{i}", list(range(3, 60 + i)), max_tokens=5, logprobs=3, prompt_logprobs=2, seed=i) for i in range(3)]
    one, two = (answers(engine, asked) for engine in (pairs.make_engine(pair.target), make_engine(worker)))
    for key, answer in one.items():
        prompt = [entry for entry in answer.prompt_logprobs or [] if entry is not None]
        other = [entry for entry in two[key].prompt_logprobs or [] if entry is not None]
        assert len(prompt) == len(other) == len(asked[0].prompt_ids) + int(key[0][1:]) - 1
        for a, b in zip([*prompt, *answer.logprobs], [*other, *two[key].logprobs], strict=True):
            assert a.rank == b.rank and [t for t, _ in a.top] == [t for t, _ in b.top]
            assert np.allclose([v for _, v in a.top], [v for _, v in b.top], atol=1e-4)


def test_prompt_logprobs_before_a_preemption(worker: Worker) -> None:
    """They are not computed again, on no rank: one that did would wait for the others for good."""
    asked = [
        request(f"r{i}", list(range(3, 60 + i)), max_tokens=20, ignore_eos=True, prompt_logprobs=0, seed=i) for i in range(3)
    ]
    expected = answers(make_engine(worker), asked)
    engine = make_engine(worker, num_blocks=18, enable_prefix_caching=False)
    found = answers(engine, asked)
    assert engine.stats().preemptions > 0
    for key, answer in expected.items():
        assert found[key].tokens == answer.tokens
        assert len(found[key].prompt_logprobs or []) == 57 + int(key[0][1:])


def test_what_a_step_costs_is_measured_over_all_ranks_and_leaves_nothing(
    worker: Worker, requests: list[Request], alone: Tokens
) -> None:
    engine = make_engine(worker)
    for probe in (Probe(1, 0, 0), Probe(2, 5, 16), Probe(1, 3, 0, 20)):
        assert 0 < run_probe(worker, probe) < 10
    assert not worker.seqs
    assert_same(tokens(answers(engine, requests)), alone)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["all"])
def test_on_a_real_model(name: str, smollm2_dir: Path, tmp_path: Path) -> None:
    """SmolLM2's 9 heads over 3 key-value heads make 6 and 3 on two ranks."""
    asked = real_requests(smollm2_dir)
    config = engine_config(smollm2_dir, kv_cache_memory_bytes=256 << 20)
    one = Engine(config)
    alone: Tokens = {}
    for each in asked:
        alone |= tokens(answers(one, [each]))
    path = tmp_path / "texts"
    datastore.build(path, list(alone.values())[::2], one.info.vocab_size, b"f" * 32)
    executor = MultiprocExecutor(msgspec.structs.replace(config, tensor_parallel_size=2))
    try:
        worker = executor._worker
        offers = {"vocab_size": one.info.vocab_size, "eos_ids": frozenset(one.info.eos_ids), "datastore": str(path)}
        for options in ({}, {"num_blocks": 30, "enable_prefix_caching": False}):
            engine = make_engine(worker, [make_drafter(n, offers) for n in SETS[name]], budget=8, **options)
            for part in np.array_split(np.arange(len(asked)), 3):
                found = tokens(answers(engine, [asked[i] for i in part]))
                for key, ids in found.items():
                    assert ids == alone[key], key
    finally:
        executor.close()
