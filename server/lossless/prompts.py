"""What `outrider verify-lossless` asks: our own prompts, or a user's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Messages = list[dict[str, str]]

_RECIPE = "Boil the potatoes for twenty minutes. Drain the potatoes. Mash the potatoes with butter, salt and warm milk."
_CODE = "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n    return total / len(values)"
_TABLE = "name,city,year\nAda,London,1815\nEmmy,Erlangen,1882\nSofia,Moscow,1850\nMary,Jedburgh,1780"

# Copying, code, lists and free prose: what drafters find easy, and what they do not.
OWN = (
    f"Repeat this text word for word:\n\n{_RECIPE}",
    "Explain in a few sentences why the sea is salty.",
    f"Rewrite this function so that it returns 0 for an empty list, and change nothing else:\n\n{_CODE}",
    "Count from one to thirty in words, separated by commas.",
    f"Turn this table into a JSON list of objects:\n\n{_TABLE}",
    "Write the beginning of a story about a clockmaker who has lost an hour.",
    "A train leaves at 9:40 and arrives at 13:05. How long does the journey take? Show each step.",
    f"Translate into French:\n\n{_RECIPE}",
    "List the planets of the solar system, each with one fact, as a numbered list.",
    "Write a Python class for a stack with push, pop and peek, with a docstring for each method.",
    "Schreibe drei Sätze über den Herbst.",
    f"Add a column `born_in_century` to this table:\n\n{_TABLE}",
    "What are the advantages and disadvantages of riding a bicycle to work?",
    "Write a polite email asking a neighbour to turn down the music after ten in the evening.",
    f"Summarise in one sentence, then repeat the original:\n\n{_RECIPE}",
    "Continue this poem:\n\nThe wind went out to find the sea,\nthe sea went out to find the sky,",
)


def own() -> list[Messages]:
    return [_user(text) for text in OWN]


def read(path: Path) -> list[Messages]:
    """The prompts of a file: a text per line, or JSON with `messages`, `turns` (the first is asked), `prompt` or `question`.

    Raises ValueError, naming the line, for a shape that is none of these and for an empty file; OSError when it cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    prompts = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _parse(line: str, where: str) -> Messages:
    if not line.lstrip().startswith("{"):
        return _user(line)
    try:
        fields: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return [{"role": message["role"], "content": message["content"]} for message in messages]
    turns = fields.get("turns")
    texts = [turns[0] if isinstance(turns, list) and turns else None, fields.get("prompt"), fields.get("question")]
    text = next((text for text in texts if isinstance(text, str) and text), None)
    if text is None:
        raise ValueError(f"{where}: none of messages, turns, prompt, question")
    return _user(text)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)
