"""The prompts a benchmark asks: our own 64 by default, or any file of questions in a known shape."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWN = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True, slots=True)
class Prompt:
    id: str
    category: str
    messages: list[dict[str, str]]
    prediction: str | None = None  # the expected answer, fit for OpenAI's `prediction`; only `copy` prompts have one


def load(path: Path = OWN, categories: Collection[str] = ()) -> list[Prompt]:
    """The prompts of a JSON-lines file, in its order, of the named categories (none named: all).

    A line is ours (`messages`), Spec-Bench's or MT-bench's (`turns`, of which the first is asked), HumanEval's (`prompt`)
    or GSM8K's (`question`). Raises ValueError for another shape and when nothing is left.
    """
    with path.open(encoding="utf-8") as lines:
        prompts = [_parse(json.loads(line), number) for number, line in enumerate(lines, start=1) if line.strip()]
    known = sorted({prompt.category for prompt in prompts})
    prompts = [prompt for prompt in prompts if not categories or prompt.category in categories]
    missing = set(categories) - set(known)
    if missing or not prompts:
        raise ValueError(f"{path}: no prompts of category {', '.join(sorted(missing)) or 'any'}; there are {', '.join(known)}")
    return prompts


def mixed(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The same prompts with the categories taking turns, so that the first n of them are a mixture for every n."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    longest = max((len(group) for group in by_category.values()), default=0)
    return [group[i] for i in range(longest) for group in by_category.values() if i < len(group)]


def _parse(line: dict[str, Any], number: int) -> Prompt:
    name = str(line.get("id", line.get("question_id", line.get("task_id", number))))
    category = str(line.get("category", "all"))
    if "messages" in line:
        return Prompt(name, category, line["messages"], line.get("prediction"))
    if "turns" in line:
        text = line["turns"][0]
    elif "prompt" in line:
        text = "Complete this code:\n\n" + line["prompt"]
    elif "question" in line:
        text = line["question"]
    else:
        raise ValueError(f"line {number}: none of messages, turns, prompt, question")
    return Prompt(name, category, [{"role": "user", "content": text}])
