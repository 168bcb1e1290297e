"""A model that makes NaN of one token: who met it in a prompt, in a draft or in somebody else's blocks, and who never did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.corruption import NOT_FINITE
from engine.engine import Engine
from engine.request import Request
from engine.worker import Worker
from tests.engine.models import tiny
from tests.engine.real import answers, load_worker, make_engine, request

NAN = 90  # the token whose embedding is NaN
BLOCK = 8


def write_model(folder: Path) -> Path:
    made = tiny.model(tiny.config("Llama", tie_word_embeddings=False))
    made.model.embed_tokens.weight[NAN] = float("nan")
    return tiny.save(made, folder)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def worker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """Over the reference attention, which reads more keys than it needs."""
    folder = write_model(tmp_path_factory.mktemp("nan"))
    return load_worker(folder, request.param, block_size=BLOCK, cpu_kernels="torch")


@pytest.fixture
def clean(worker: Worker) -> Worker:
    """As it was loaded, whatever a test before has left."""
    worker.drop(list(worker.seqs))
    worker.kv.kv.zero_()
    return worker


def bad(length: int = 25) -> Request:
    return request("bad", [5, 6, NAN, *[3] * (length - 3)], max_tokens=5, temperature=0.0)


def healthy(count: int = 1) -> list[Request]:
    """Greedy and sampled; none is ever answered with the token."""
    params = {"max_tokens": 10, "logit_bias": {NAN: -100.0}, "ignore_eos": True}
    return [request(f"ok{i}", list(range(10 + i, 30)), temperature=0.8 * (i % 2), seed=i, **params) for i in range(count)]


def tokens(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], list[int]]:
    """Of those that ended well."""
    found = answers(engine, requests)
    return {key: answer.tokens for key, answer in found.items() if answer.finish_reason == "length"}


def is_finite(worker: Worker) -> bool:
    return bool(torch.isfinite(worker.kv.kv).all())


def test_the_first_of_a_batch_ends_alone(clean: Worker) -> None:
    """It has block 0, and the others' contexts are rounded up."""
    expected = tokens(make_engine(clean), healthy(8))
    assert len(expected) == 8
    clean.kv.kv.zero_()
    engine = make_engine(clean)
    assert tokens(engine, [bad(), *healthy(8)]) == expected
    assert engine.stats().corrupted_requests == 1
    assert is_finite(clean)


def test_a_chunk_of_a_prompt_ends_its_request_at_once(clean: Worker) -> None:
    """Nobody judges it, and an abort before the next one would free its blocks as they are."""
    expected = tokens(make_engine(clean), healthy(4))
    engine = make_engine(clean, max_num_batched_tokens=16)
    engine.add(bad(60))
    (delta,) = engine.step()
    assert (delta.finish_reason, delta.error) == ("error", NOT_FINITE)
    assert engine.stats().corrupted_requests == 1
    assert is_finite(clean)
    again = answers(engine, [bad(60)])["bad", 0].usage
    assert again is not None and again.cached_tokens == 0, "nobody starts from what it computed"
    assert tokens(engine, healthy(4)) == expected


def test_a_step_of_chunks_only_blames_the_right_one(clean: Worker) -> None:
    engine = make_engine(clean, max_num_batched_tokens=64)
    for one in (request("long", [7] * 40, max_tokens=4, ignore_eos=True), bad(60)):
        engine.add(one)
    (delta,) = [delta for delta in engine.step() if delta.request_id == "bad"]
    assert delta.finish_reason == "error"
    found = answers(engine, [])
    assert found["long", 0].finish_reason == "length"


def test_blocks_of_a_preempted_sequence_are_no_longer_its_own(clean: Worker) -> None:
    """They belong to the one that preempted it, which leaves NaN in them: they are zeroed although they were another's."""
    expected = tokens(make_engine(clean), healthy())
    engine = make_engine(clean, num_blocks=20, enable_prefix_caching=False)
    engine.add(request("low", [3] * 80, max_tokens=40, priority=5, ignore_eos=True))
    for _ in range(2):
        engine.step()
    engine.add(request("bad", [NAN] * 100, max_tokens=20, priority=0))
    deltas = engine.step()
    assert [delta.finish_reason for delta in deltas if delta.request_id == "bad"] == ["error"]
    assert engine.stats().preemptions == 1
    assert is_finite(clean)
    engine.abort("low")
    assert tokens(engine, healthy()) == expected
