"""Timing steps before there are requests leaves nothing behind: no sequence, no other drafters, the same answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.costs import Costs, Measurable
from engine.engine import Engine
from engine.executors.local import LocalExecutor
from engine.probe import Probe, make_plan
from tests.engine.real import answers, request
from tests.fakes import fake_info


@pytest.fixture
def config(tiny_llama_dir: Path, tmp_path: Path) -> EngineConfig:
    return EngineConfig(
        model=str(tiny_llama_dir), dtype="float32", num_threads=1, drafters=["ngram"], policy="goodput", check_integrity=True,
        kv_cache_memory_bytes=8 << 20, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip


def test_probes_leave_nothing_behind(config: EngineConfig) -> None:
    executor = LocalExecutor(config)
    assert isinstance(executor, Measurable)
    worker = executor._worker
    drafting, policy = worker.drafting, worker.policy
    for probe in (Probe(1, 0, 0), Probe(1, 15, 64), Probe(4, 3, 0), Probe(0, 0, 0, 40), Probe(2, 3, 16, 10)):
        assert 0 < executor.probe(probe) < 10
        assert worker.seqs == {} and worker.drafting is drafting and worker.policy is policy
    assert worker.drafting.take_fallbacks() == {} and worker.drafting.take_seconds() == {}


def test_answers_are_the_same_after_a_profile(config: EngineConfig) -> None:
    asked = [request(f"r{i}", [5 + i, 7, 9, 5 + i, 7], max_tokens=24, seed=i, ignore_eos=True) for i in range(3)]
    executor = LocalExecutor(config)
    plain = answers(Engine(EngineConfig(model="m", policy="off", check_integrity=True), executor), asked)
    costs = Costs(config, executor, executor.info, seconds=0.5, fresh=True)
    assert costs.model.measured
    engine = Engine(config, executor)
    assert {key: answer.tokens for key, answer in answers(engine, asked).items()} == {k: a.tokens for k, a in plain.items()}
    engine.close()


def test_an_engine_keeps_what_it_learned_when_it_closes(config: EngineConfig) -> None:
    engine = Engine(config)
    assert engine.costs is not None and engine.costs.file is not None
    before = engine.costs.file.read_bytes()
    answers(engine, [request("r", [5, 7, 9, 5, 7], max_tokens=40, ignore_eos=True)])
    engine.close()
    assert engine.costs.file.read_bytes() != before


def test_a_probe_says_what_it_needs() -> None:
    info = fake_info(max_model_len=64, num_blocks=10, block_size=4, max_num_seqs=4, max_num_batched_tokens=24)
    assert Probe(3, 7, 0).tokens == 24 and Probe(2, 1, 8, 5).tokens == 9
    assert Probe(3, 7, 16).blocks(4) == 4 + 3 * 2
    assert Probe(3, 7, 16).fits(info)
    for probe in (Probe(3, 8, 0), Probe(5, 0, 0), Probe(4, 0, 0, 1), Probe(1, 0, 64), Probe(3, 7, 20)):
        assert not probe.fits(info)
    plan = make_plan(Probe(2, 3, 8, 6), 4, 100)
    assert [(row.num_computed, row.num_new, row.budget) for row in plan.rows] == [(8, 1, 3), (8, 1, 3), (0, 6, 0)]
    tables = [row.block_ids for row in plan.rows]
    assert tables == [[0, 1, 2], [0, 1, 3], [4, 5]]  # the context is shared, what is written is not
    assert all(0 < token < 100 for new in plan.new for token in new.request.prompt_ids)
