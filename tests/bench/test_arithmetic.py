"""The numbers a benchmark reports, on answers whose times are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.arithmetic import Answer, decode_rate, median, percentile, poisson_arrivals


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], p: float) -> None:
    assert percentile(values, p) == pytest.approx(float(np.percentile(values, p)), rel=1e-9, abs=1e-6)


def test_no_values_have_no_percentile() -> None:
    assert math.isnan(percentile([], 50))


def test_median_ignores_the_order_of_its_values() -> None:
    assert median([5.0, 1.0, 3.0]) == 3.0
    assert median([4.0, 1.0]) == 2.5


def test_arrivals_repeat_with_their_seed_and_differ_with_another() -> None:
    assert poisson_arrivals(3.0, 20, seed=1) == poisson_arrivals(3.0, 20, seed=1)
    assert poisson_arrivals(3.0, 20, seed=1) != poisson_arrivals(3.0, 20, seed=2)


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    arrivals = poisson_arrivals(4.0, 20_000, seed=0)
    gaps = np.diff([0.0, *arrivals])
    assert (gaps > 0).all()
    # The gaps of a Poisson process are exponential: their deviation equals their mean.
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)


@pytest.mark.parametrize("rate", [0.0, -1.0])
def test_a_rate_must_be_positive(rate: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        poisson_arrivals(rate, 3, seed=0)


def test_times_of_an_answer() -> None:
    answer = Answer("p", "open", start=10.0, times=[10.5, 10.7, 11.4], end=11.5, tokens=6)
    assert answer.ttft == pytest.approx(0.5)
    assert answer.e2e == pytest.approx(1.5)
    assert answer.itl == pytest.approx([0.2, 0.7])
    # Five tokens after the first in one second, though they came in two events and one had no text.
    assert answer.tpot == pytest.approx(0.2)


def test_an_answer_of_one_token_has_no_time_per_output_token() -> None:
    assert math.isnan(Answer("p", "open", start=0.0, times=[1.0], end=1.0, tokens=1).tpot)


def test_an_answer_without_text_still_has_a_first_token() -> None:
    answer = Answer("p", "open", start=1.0, end=3.0, tokens=1)
    assert (answer.ttft, answer.span, answer.itl) == (2.0, 0.0, [])
    assert math.isnan(Answer("p", "open", start=1.0, end=3.0, tokens=2).tpot)


def test_decode_rate_weighs_answers_by_their_time() -> None:
    fast = Answer("a", "open", start=0.0, times=[1.0], end=2.0, tokens=101)  # 100 tokens in 1 s
    slow = Answer("b", "open", start=0.0, times=[1.0], end=4.0, tokens=51)  # 50 tokens in 3 s
    one = Answer("c", "open", start=0.0, times=[1.0], end=1.0, tokens=1)
    assert decode_rate([fast, slow, one]) == pytest.approx(150 / 4)
    assert math.isnan(decode_rate([one]))
