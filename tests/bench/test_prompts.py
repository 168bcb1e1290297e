"""Our own prompts are what they promise, and other files of questions can be read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from bench.prompts import Prompt, load, mixed


def test_our_own_prompts() -> None:
    prompts = load()
    counts = Counter(prompt.category for prompt in prompts)
    assert len(prompts) == len({prompt.id for prompt in prompts}) == 64
    assert set(counts) == {"open", "code", "math", "extraction", "summarise", "translate", "copy"}
    assert min(counts.values()) >= 8


def test_a_copy_prompt_shows_most_of_the_answer_it_expects() -> None:
    for prompt in load(categories=["copy"]):
        assert prompt.prediction is not None
        shown = "\n".join(message["content"] for message in prompt.messages)
        lines = prompt.prediction.split("\n")
        assert sum(line in shown for line in lines) >= 0.75 * len(lines), prompt.id
        assert prompt.prediction not in shown, f"{prompt.id}: nothing to edit"


def test_any_number_of_mixed_prompts_is_a_mixture() -> None:
    prompts = [Prompt(f"{category}{i}", category, []) for category, n in (("a", 3), ("b", 1), ("c", 2)) for i in range(n)]
    assert [prompt.id for prompt in mixed(prompts)] == ["a0", "b0", "c0", "a1", "c1", "a2"]


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ({"question_id": 3, "category": "qa", "turns": ["first", "second"]}, "first"),
        ({"task_id": "H/1", "prompt": "def f():"}, "Complete this code:\n\ndef f():"),
        ({"question": "how many?"}, "how many?"),
    ],
)
def test_other_shapes(tmp_path: Path, line: dict[str, object], asked: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert load(path)[0].messages == [{"role": "user", "content": asked}]


def test_an_unknown_shape_or_category_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"text": "?"}\n')
    with pytest.raises(ValueError, match="line 1"):
        load(path)
    with pytest.raises(ValueError, match="poetry"):
        load(categories=["poetry"])
