"""The default dtype too: the same bits come out, on the native CPU kernels for any draft tree.

On torch's operators for chains of drafts, whose keys lie in the order of plain decoding: in a branched tree the keys of wrong
siblings lie between those of the path, and bf16 sums over keys may round otherwise.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.request import Request
from engine.worker import Worker
from kernels.cpu.build import Unavailable, library
from tests.engine.real import Answer, GarbageDrafter, OracleDrafter, answers, load_worker, make_engine
from tests.engine.test_invisible import assert_same, make_requests

DRAFTERS = ["prediction", "ngram"]


@pytest.fixture(scope="module", params=["native", pytest.param("torch", marks=pytest.mark.long)])
def worker(request: pytest.FixtureRequest, smollm2_dir: Path) -> Worker:
    if request.param == "native":
        try:
            library()
        except Unavailable as unavailable:
            pytest.skip(f"no native kernels here: {unavailable}")
    return load_worker(smollm2_dir, "bfloat16", block_size=8, cpu_kernels=request.param)


@pytest.fixture(scope="module")
def requests(smollm2_dir: Path) -> list[Request]:
    return make_requests(smollm2_dir)


@pytest.fixture(scope="module")
def alone(worker: Worker, requests: list[Request]) -> dict[tuple[str, int], Answer]:
    out: dict[tuple[str, int], Answer] = {}
    for one in requests:
        out |= answers(make_engine(worker), [one])
    return out


def test_alone_with_drafts(worker: Worker, requests: list[Request], alone: dict[tuple[str, int], Answer]) -> None:
    for one in requests:
        assert_same(answers(make_engine(worker, DRAFTERS), [one]), alone)


def test_in_a_batch_after_preemption(worker: Worker, requests: list[Request], alone: dict[tuple[str, int], Answer]) -> None:
    engine = make_engine(worker, DRAFTERS, num_blocks=20)
    found = answers(engine, requests)
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.num_accepted_tokens > 0
    assert_same(found, alone)


def test_branched_trees(worker: Worker, requests: list[Request], alone: dict[tuple[str, int], Answer]) -> None:
    if worker.info.backend != "native":
        pytest.skip("bf16 on torch's operators is bit-equal for chains only")
    known = {key: answer.tokens for key, answer in alone.items()}
    for drafter in (GarbageDrafter(worker.info.vocab_size), OracleDrafter(worker.info.vocab_size, known)):
        engine = make_engine(worker, [drafter], num_blocks=24, budget=12)
        found = answers(engine, requests)
        assert engine.stats().num_draft_tokens > 0
        assert_same(found, alone)
