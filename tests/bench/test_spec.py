"""bench.spec: which questions are asked how, and what their answers are summed up to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import serve, spec, spec_picture
from bench.arithmetic import Answer
from bench.client import Endpoint
from bench.load import Ask, Run
from bench.prompts import Prompt
from bench.spec import Arm, asks, group, measure, subset, summarise, table


def report(steps: int, drafted: int, positions: list[int], **by_drafter: int) -> dict[str, Any]:
    return {
        "num_spec_steps": steps,
        "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": sum(positions),
        "num_accepted_tokens_per_pos": positions,
        "drafters": {name: {"num_draft_tokens": drafted, "num_accepted_draft_tokens": n} for name, n in by_drafter.items()},
        "budget_reasons": {"cost": steps},
        "estimated_seconds_saved": 0.5,
    }


def answer(name: str, seconds: float, text: str = "text", **speculation: Any) -> Answer:
    """Eleven tokens, the first after one second."""
    times = [1.0, 1.0 + seconds]
    return Answer(name, "qa", 0.0, 1.0 + seconds, times, tokens=11, text=text, finish_reason="length", speculation=speculation)


def test_questions_are_grouped_as_in_the_paper() -> None:
    prompts = [Prompt(str(i), category, []) for i, category in enumerate(["writing", "math", "writing", "rag", "rag", "rag"])]
    groups = subset(prompts, 2)
    assert {name: [prompt.id for prompt in found] for name, found in groups.items()} == {
        "mt_bench": ["0", "1", "2"],
        "rag": ["3", "4"],
    }
    assert sum(map(len, subset(prompts, None).values())) == 6
    assert group("summarization") == "summarization"


def test_a_row_sums_up_both_arms() -> None:
    off = Arm([answer("a", 2.0), answer("b", 2.0, "other")], seconds=6.0)
    on = Arm([answer("a", 1.0, **report(4, 10, [3, 2], ngram=5)), answer("b", 1.0, **report(6, 10, [2, 2, 1], suffix=5))], 4.0)
    row = summarise("qa", off, on)
    assert (row.questions, row.errors, row.equal, row.tokens, row.steps) == (2, 0, 1, 22, 10)
    assert row.mat == pytest.approx(22 / 10)
    assert row.acceptance == pytest.approx(10 / 20)
    assert (row.decode_off, row.decode_on) == pytest.approx((10 / 2, 10 / 1))
    assert (row.total_off, row.total_on) == pytest.approx((22 / 6, 22 / 4))
    assert row.per_position == pytest.approx([0.5, 0.4, 0.1])
    assert (row.drafters, row.reasons, row.seconds_saved) == ({"ngram": 5, "suffix": 5}, {"cost": 10}, 1.0)
    text = table([row])
    assert "ngram 50 %, suffix 50 %" in text
    assert " 2.00 |" in text  # twice as fast


def test_failures_are_counted_and_give_no_figures() -> None:
    broken = Answer("a", "qa", 0.0, error="status 500")
    row = summarise("qa", Arm([broken], 1.0), Arm([broken], 1.0))
    assert (row.errors, row.equal, row.steps) == (2, 0, 0)
    assert math.isnan(row.mat)
    assert "-" in table([row])


def test_the_arms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, list[str]]] = []

    async def run(endpoint: Endpoint, ask: Ask, prompts: list[Prompt], **options: Any) -> Run:
        order.append((ask.model, [prompt.id for prompt in prompts]))
        return Run([Answer(prompt.id, "qa", 0.0) for prompt in prompts], 1.0, 0.0)

    monkeypatch.setattr(spec, "run", run)
    prompts = [Prompt(name, "qa", []) for name in "abcde"]
    off, on = measure(Endpoint("http://x"), Ask("off"), Ask("on"), prompts, concurrency=2, limit=1.0)
    assert order == [
        ("off", ["a", "b"]),
        ("on", ["a", "b"]),
        ("on", ["c", "d"]),
        ("off", ["c", "d"]),
        ("off", ["e"]),
        ("on", ["e"]),
    ]
    assert [answer.prompt_id for answer in off.answers] == [answer.prompt_id for answer in on.answers] == list("abcde")
    assert (off.seconds, on.seconds) == (3.0, 3.0)


def test_what_the_arms_ask() -> None:
    options = spec._parser().parse_args(["--drafter", "ngram,suffix", "--max-nodes", "0"])
    off, on = asks(options, "m", "5")
    assert off.extra == {"speculation": "off", "include_speculation": True, "cache_salt": "spec-5-off"}
    assert on.extra["speculation"] == {"max_nodes": 0, "drafter": ["ngram", "suffix"]}
    assert on.extra["cache_salt"] == "spec-5-on"
    assert asks(spec._parser().parse_args([]), "m", "5")[1].extra["speculation"] == {}


def test_nothing_learned_before_serves_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the warm-up, which asks the same questions, nor an earlier run on the same server."""
    salts: list[str] = []

    async def run(endpoint: Endpoint, ask: Ask, prompts: list[Prompt], **options: Any) -> Run:
        salts.extend(json.loads(ask.body(prompt))["cache_salt"] for prompt in prompts)
        return Run([answer(prompt.id, 1.0, **report(1, 0, [])) for prompt in prompts], 1.0, 0.0)

    monkeypatch.setattr(spec, "run", run)
    monkeypatch.setattr(serve.append, "__defaults__", (tmp_path,))
    (tmp_path / "q").write_text("".join(json.dumps({"category": "qa", "question": text}) + "\n" for text in "abc"))
    for _ in range(2):
        assert spec.main(["--model", "m", "--file", str(tmp_path / "q"), "--picture", str(tmp_path / "p.png")]) == 0
    for first in (0, 10):
        warm, measured = salts[first : first + 4], salts[first + 4 : first + 10]
        assert len(set(warm)) == 4
        assert sorted(measured.count(salt) for salt in set(measured)) == [3, 3]
        assert not set(warm) & set(measured)
    assert len(set(salts)) == 2 * (4 + 2)


def test_a_picture_needs_matplotlib_and_nothing_else_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(spec_picture, "import_module", missing)
    assert "not installed" in spec_picture.draw(tmp_path / "x.png", {"all": [0.5]})
    assert not (tmp_path / "x.png").exists()


def test_the_file_of_questions_is_spec_bench(shared_data: Path) -> None:
    groups = subset(spec.load(shared_data / "spec_bench.jsonl"), None)
    assert {name: len(found) for name, found in groups.items()} == {
        "mt_bench": 80,
        "translation": 80,
        "summarization": 80,
        "qa": 80,
        "math_reasoning": 80,
        "rag": 80,
    }
