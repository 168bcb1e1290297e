"""One worker over a real model: what goes wrong in one row stays in that row, and prompt chunks are not judged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.corruption import NOT_FINITE
from engine.models.batch import ForwardBatch
from engine.plan import NewSequence, Row, StepPlan
from engine.worker import Worker
from tests.engine.real import answers, load_worker, make_engine, request

PROMPT = [1604, 803, 24, 81, 28, 278, 727, 472, 1003, 253, 1232, 278, 198, 198, 1604, 3044, 24, 81, 28, 278, 727]


@pytest.fixture(scope="module")
def worker(smollm2_dir: Path) -> Worker:
    return load_worker(smollm2_dir)


def test_a_prompt_chunk_is_not_judged_and_the_last_one_is(worker: Worker) -> None:
    worker.seqs.clear()
    one = request("a", PROMPT, max_tokens=4, temperature=0.0, prompt_logprobs=1)
    first = worker.step(StepPlan(1, [NewSequence(0, one, 0)], [Row(0, 0, 8, 0, [3, 1], True)], []))
    assert first.rows[0].token_ids == [] and first.num_forward_tokens == 8
    assert first.rows[0].prompt_logprobs is not None and len(first.rows[0].prompt_logprobs) == 8
    rest = worker.step(StepPlan(2, [], [Row(0, 8, len(PROMPT) - 8, 0, [], False)], []))
    assert len(rest.rows[0].token_ids) == 1
    assert rest.rows[0].prompt_logprobs is not None and len(rest.rows[0].prompt_logprobs) == len(PROMPT) - 9
    assert worker.seqs[0].num_computed == len(PROMPT)
    worker.step(StepPlan(3, [], [Row(0, len(PROMPT), 1, 0, [], False)], []))
    worker.step(StepPlan(4, [], [], [0]))
    assert not worker.seqs


def test_prompt_logprobs_are_computed_once_though_the_prompt_is_computed_again(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = request("a", PROMPT, max_tokens=14, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    other = request("first", PROMPT[1:], max_tokens=16, temperature=0.0, ignore_eos=True, priority=-1)
    alone = answers(make_engine(worker), [one])
    counts: list[int] = []
    real = worker.prompt_rows

    def counted(*args: Any) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        for i, begin, end, rows in real(*args):
            counts.append(len(rows))
            yield i, begin, end, rows

    monkeypatch.setattr(worker, "prompt_rows", counted)
    engine = make_engine(worker, num_blocks=5, enable_prefix_caching=False)
    found = answers(engine, [other, one])
    usage = found["a", 0].usage
    assert usage is not None and usage.preemptions
    assert sum(counts) == len(one.prompt_ids) - 1
    assert found["a", 0].tokens == alone["a", 0].tokens
    assert len(found["a", 0].prompt_logprobs or []) == len(one.prompt_ids)


def test_logits_that_are_not_finite_end_one_request_only(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = [request(f"ok{i}", PROMPT[i:], max_tokens=6, temperature=0.5, seed=i) for i in range(3)]
    expected = answers(make_engine(worker), healthy)
    real = worker.runner.node_logits

    def poisoned(hidden: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        logits = real(hidden, batch)
        for row, first in enumerate(batch.node_rows.tolist()):
            if int(batch.positions[first]) >= len(PROMPT) + 2:  # only the longest prompt gets this far before its end
                logits[row] = float("nan")
                worker.kv.kv[:, batch.block_tables[0]] = float("nan")
        return logits

    monkeypatch.setattr(worker.runner, "node_logits", poisoned)
    engine = make_engine(worker)
    engine.add(request("bad", PROMPT, max_tokens=20, temperature=0.0))
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    assert deltas[-1].finish_reason == "error" and deltas[-1].error == NOT_FINITE
    assert engine.stats().corrupted_requests == 1 and engine.stats().blocks_used == 0
    monkeypatch.undo()
    assert torch.isfinite(worker.kv.kv).all(), "the next owner of these blocks would read NaN behind its mask"
    found = answers(make_engine(worker), healthy)
    assert {key: answer.tokens for key, answer in found.items()} == {key: answer.tokens for key, answer in expected.items()}


def test_a_corrupted_row_leaves_its_batch_alone(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = [request(f"ok{i}", PROMPT[i:], max_tokens=6, temperature=0.5, seed=i) for i in range(1, 4)]
    expected = answers(make_engine(worker), healthy)
    real = worker.runner.node_logits

    def poisoned(hidden: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        logits = real(hidden, batch)
        logits[0] = float("nan")  # "bad" came first, so row 0 is its root while it lives
        monkeypatch.setattr(worker.runner, "node_logits", real)
        return logits

    monkeypatch.setattr(worker.runner, "node_logits", poisoned)
    found = answers(make_engine(worker), [request("bad", PROMPT, max_tokens=6, temperature=0.0), *healthy])
    assert found.pop(("bad", 0)).finish_reason == "error"
    assert {key: answer.tokens for key, answer in found.items()} == {key: answer.tokens for key, answer in expected.items()}


def test_blocks_that_a_corrupted_sequence_shares_are_kept(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences over one cached prefix: the healthy one still reads it after the other has ended in NaN."""
    prompt = PROMPT * 3
    healthy = request("ok", [*prompt, 28], max_tokens=8, temperature=0.0)
    expected = answers(make_engine(worker), [healthy])
    engine = make_engine(worker)
    answers(engine, [request("warm", prompt, max_tokens=1)])  # publishes the prefix
    real = worker.runner.node_logits

    def poisoned(hidden: torch.Tensor, batch: ForwardBatch) -> torch.Tensor:
        logits = real(hidden, batch)
        if len(logits) == 2:
            logits[0] = float("nan")
            monkeypatch.setattr(worker.runner, "node_logits", real)
        return logits

    monkeypatch.setattr(worker.runner, "node_logits", poisoned)
    found = answers(engine, [request("bad", [*prompt, 30], max_tokens=8), healthy])
    assert found["bad", 0].finish_reason == "error"
    usage = found["ok", 0].usage
    assert usage is not None and usage.cached_tokens >= 48
    assert found["ok", 0].tokens == expected["ok", 0].tokens
