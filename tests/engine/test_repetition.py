"""What counts as going round in circles."""

from __future__ import annotations

import random

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.repetition import LEAST_TOKENS, WINDOW, ends_in_a_loop
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.stats import StatsRecorder
from tests.fakes import FakeExecutor, fake_info, make_request

RANDOM = random.Random(0)
PROSE = [RANDOM.randrange(1000) for _ in range(2000)]


@pytest.mark.parametrize("period", [1, 2, 7, 16, 64, 128])
def test_a_loop_is_seen_whatever_came_before(period: int) -> None:
    passage = [10_000 + i for i in range(period)]
    loop = passage * max(4, -(-LEAST_TOKENS // period))
    assert ends_in_a_loop(PROSE + loop)
    assert ends_in_a_loop(PROSE + loop + passage[: period // 2])  # cut off anywhere


@pytest.mark.parametrize(
    "tokens",
    [
        [],
        [5] * (LEAST_TOKENS - 1),  # too short to mean anything
        PROSE,
        PROSE + list(range(3000, 3040)) * 3,  # three times: a refrain
        [5] * 100 + PROSE[:40],  # it got out of it
        PROSE + [7] * 300 + [2],  # it ended by itself
    ],
    ids=["empty", "short", "prose", "refrain", "recovered", "ended"],
)
def test_what_is_no_loop(tokens: list[int]) -> None:
    assert not ends_in_a_loop(tokens)


def test_only_the_end_is_looked_at() -> None:
    assert ends_in_a_loop([1, 2, 3] * WINDOW)
    assert not ends_in_a_loop([1, 2, 3] * WINDOW + PROSE[:WINDOW])


def test_the_engine_counts_the_answers_that_loop() -> None:
    recorder = StatsRecorder()
    for prompt, answer in (([7] * 100, PROSE[:40]), (PROSE[:9], [7] * 100), (PROSE[:9], [7] * 60 + PROSE[:40])):
        seq = Sequence(0, Request(request_id="r", prompt_ids=prompt, params=SamplingParams(max_tokens=len(answer))))
        seq.commit(answer)
        recorder.finished(seq)
    assert recorder.take(running=0, waiting=0, blocks_used=0, blocks_total=9).looping_sequences == 1  # a prompt may loop


def test_the_engine_says_how_much_of_its_prompts_is_still_to_be_read() -> None:
    config = EngineConfig(model="fake", policy="off", check_integrity=True)
    engine = Engine(config, FakeExecutor(fake_info(max_num_seqs=1, max_num_batched_tokens=8)))
    engine.add(make_request("first", prompt=list(range(1, 21)), max_tokens=2))
    engine.add(make_request("second", prompt=list(range(1, 6)), max_tokens=2))
    seen = []
    while engine.has_work():
        seen.append(engine.stats().uncomputed_tokens)
        engine.step()
    assert seen[:4] == [25, 17, 9, 5]  # 20 tokens in chunks of 8, and 5 that wait
    assert engine.stats().uncomputed_tokens == 0
