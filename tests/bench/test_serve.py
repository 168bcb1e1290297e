"""What a load run is summed up to, and the comparison of answers between arms."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import process
from bench.arithmetic import Answer
from bench.load import Run
from bench.prompts import Prompt
from bench.serve import Level, differing, save_outputs, take
from bench.summary import markdown, medians, summarise, table


def answer(name: str, text: str = "text", **fields: object) -> Answer:
    return Answer(name, "open", start=0.0, times=[1.0, 2.0], end=2.0, tokens=11, text=text, **fields)  # type: ignore[arg-type]


def test_a_failed_answer_gives_no_tokens_and_no_latency() -> None:
    numbers = summarise(Run([answer("a"), answer("b", error="status 500")], wall=4.0, client_cpu=0.2))
    assert (numbers["requests"], numbers["errors"], numbers["output_tokens"]) == (1, 1, 11)
    assert numbers["total_rate"] == pytest.approx(11 / 4)
    assert numbers["decode_rate"] == pytest.approx(10 / 1)
    assert numbers["ttft_p50"] == numbers["ttft_p99"] == 1.0
    assert numbers["client_cpu_share"] == pytest.approx(0.05)


def test_repeats_are_summed_up_by_medians_with_their_spread() -> None:
    runs = [summarise(Run([answer("a")], wall=wall, client_cpu=0.0)) for wall in (1.0, 2.0, 11.0)]
    together = medians(runs)
    assert together["wall"] == 2.0
    assert together["total_rate"] == pytest.approx(5.5)
    assert together["spread"] == pytest.approx((11 - 1) / 5.5)


def test_the_table_shows_only_what_was_measured() -> None:
    text = table([("1 streams", medians([summarise(Run([answer("a")], 1.0, 0.0))]))])
    assert "total tok/s" in text
    assert "peak MB" not in text
    assert len({len(line) for line in text.splitlines()}) == 1


def test_markdown_rows_line_up() -> None:
    assert markdown([["a", "bb"], ["ccc", "d"]]) == "|   a | bb |\n|----:|---:|\n| ccc |  d |"


def test_outputs_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    path = tmp_path / "outputs.jsonl"
    save_outputs(path, [answer("a"), answer("b", "bé\n")])
    assert differing(path, [answer("b", "bé\n"), answer("a")]) == []
    assert differing(path, [answer("a", "other"), answer("b", "bé\n", error="x"), answer("c")]) == ["a", "b", "c"]


def test_prompts_start_over_at_the_end() -> None:
    prompts = [Prompt(name, "open", []) for name in "abc"]
    assert "".join(prompt.id for prompt in take(prompts, 5, skip=2)) == "cabca"


def test_a_level_is_named_by_what_it_controls() -> None:
    assert (Level(concurrency=4).label, Level(rate=2.5).label) == ("4 streams", "2.5/s")


def test_own_process_has_cpu_time_and_memory() -> None:
    pid = os.getpid()
    assert pid in process.tree([pid])
    before = process.cpu_seconds([pid])
    assert before > 0
    sum(i * i for i in range(3_000_000))
    assert process.cpu_seconds([pid]) >= before
    assert 10 < process.peak_megabytes([pid]) < 100_000


def test_a_process_that_is_gone_costs_nothing() -> None:
    assert process.cpu_seconds([2**22 + 1]) == 0
    assert process.peak_megabytes([2**22 + 1]) == 0
