"""Seconds of queued work: tokens that wait over the tokens a second that were done."""

from __future__ import annotations

import pytest

from engine.messages import EngineStats
from server.histogram import Histogram
from server.queued_work import QueuedWork


@pytest.fixture
def answers() -> Histogram:
    """Ten answers of 50 tokens."""
    histogram = Histogram("lengths", "", (10.0, 100.0))
    histogram.observe(50, 10)
    return histogram


def stats(**fields: float) -> EngineStats:
    return EngineStats(**fields)  # type: ignore[arg-type]


def test_nothing_waits_nothing_is_known(answers: Histogram) -> None:
    work = QueuedWork()
    assert work.seconds == 0
    work.update(stats(uncomputed_tokens=1000, waiting=3), answers)
    assert work.seconds == 0  # no step yet: no rate, and no guess


def test_prompts_and_expected_answers_over_the_rate(answers: Histogram) -> None:
    work = QueuedWork()
    work.update(stats(prompt_tokens=600, generation_tokens=400, seconds_step=2.0), answers)  # 500 tokens a second
    assert work.seconds == 0
    waiting = stats(prompt_tokens=600, generation_tokens=400, seconds_step=2.0, uncomputed_tokens=850, waiting=3)
    work.update(waiting, answers)
    assert work.seconds == pytest.approx((850 + 3 * 50) / 500)
    work.update(waiting, answers)  # the same message again changes nothing
    assert work.seconds == pytest.approx(2.0)


def test_the_rate_follows_the_engine(answers: Histogram) -> None:
    work = QueuedWork()
    work.update(stats(generation_tokens=1000, seconds_step=10.0), answers)
    for second in range(1, 101):  # four times as fast from now on
        work.update(stats(generation_tokens=1000 + 400 * second, seconds_step=10.0 + second, uncomputed_tokens=800), answers)
    assert work.seconds == pytest.approx(2.0, rel=0.02)


def test_the_expected_answer_follows_the_answers(answers: Histogram) -> None:
    work = QueuedWork()
    for _ in range(30):
        answers.observe(500, 10)
        work.update(stats(generation_tokens=1000, seconds_step=10.0, waiting=2), answers)
    assert work.seconds == pytest.approx(2 * 500 / 100, rel=0.02)


def test_a_new_engine_counts_from_zero(answers: Histogram) -> None:
    work = QueuedWork()
    work.update(stats(generation_tokens=1000, seconds_step=10.0), answers)
    work.update(stats(), answers)
    work.update(stats(generation_tokens=100, seconds_step=1.0, uncomputed_tokens=300), answers)
    assert work.seconds == pytest.approx(3.0)
