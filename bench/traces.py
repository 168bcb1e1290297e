"""Answers to replay in the simulation: real texts where they lie beside the repository, or made up from a seed.

`copy` answers repeat what their prompt says, `open` ones go on as they please; a mixture has both, so that the right draft
length is another for each request. Real texts are cut into words, numbers and signs, about as long as tokens are.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.recording import Recorded

TOKENS = re.compile(r"\s?[A-Za-z]{1,6}|\d{1,3}|[^\w\s]|\s+|\w")
PROMPT, ANSWER = (64, 320), (32, 224)  # tokens: any length between
WORDS = 4000  # of the made-up language
FOLLOWERS = 6  # words that can follow a word in it
COPY_FILES, OPEN_FILES = ("openai_openapi_subset.json", "toolcall_multiturn.jsonl"), ("wiki_text.txt", "pride_prejudice.txt")


def synthetic(count: int, copy_share: float = 0.5, seed: int = 0) -> list[Recorded]:
    """`count` made-up answers, of which about `copy_share` are of the kind `copy`."""
    rng = random.Random(seed)
    followers = [[rng.randrange(WORDS) for _ in range(FOLLOWERS)] for _ in range(WORDS)]

    def speak(length: int, word: int) -> list[int]:
        words = []
        for _ in range(length):
            # Mostly the first follower, so that a phrase seen once is often, but not always, said again.
            word = followers[word][min(int(rng.expovariate(1.0)), FOLLOWERS - 1)]
            words.append(word)
        return words

    found = []
    for i in range(count):
        said, answer = speak(rng.randint(*PROMPT), rng.randrange(WORDS)), rng.randint(*ANSWER)
        copies = rng.random() < copy_share
        text: list[int] = []
        while len(text) < answer:
            if copies and rng.random() < 0.9:
                begin = rng.randrange(len(said) - 20)
                text += said[begin : begin + rng.randint(10, 60)]
            else:
                text += speak(rng.randint(3, 12), (text or said)[-1])
        found.append(_recorded(f"made-up-{i}", "copy" if copies else "open", said, text[:answer]))
    return found


def real(folder: Path, count: int, copy_share: float = 0.5, seed: int = 0) -> list[Recorded]:
    """Stretches of the texts in `folder`, `copy_share` of them from texts that repeat themselves. Raises OSError."""
    rng = random.Random(seed)
    ids: dict[str, int] = {}
    copy = [_tokens(folder / name, ids) for name in COPY_FILES]
    plain = [_tokens(folder / name, ids) for name in OPEN_FILES]
    found = []
    for i in range(count):
        kind, texts = ("copy", copy) if rng.random() < copy_share else ("open", plain)
        text = rng.choice(texts)
        prompt, answer = rng.randint(*PROMPT), rng.randint(*ANSWER)
        begin = rng.randrange(len(text) - prompt - answer)
        middle = begin + prompt
        found.append(_recorded(f"{kind}-{i}", kind, text[begin:middle], text[middle : middle + answer]))
    return found


def kinds(recorded: Sequence[Recorded]) -> dict[str, int]:
    """How many of each kind."""
    return {kind: sum(one.category == kind for one in recorded) for kind in sorted({one.category for one in recorded})}


def _recorded(name: str, category: str, prompt: list[int], answer: list[int]) -> Recorded:
    return Recorded(name, category, 0.0, 0, 0, prompt, answer)


def _tokens(file: Path, ids: dict[str, int]) -> list[int]:
    return [ids.setdefault(token, len(ids)) for token in TOKENS.findall("".join(_text(file)))]


def _text(file: Path) -> Iterator[str]:
    """The first megabyte of a text; of conversations, what was said."""
    with file.open(encoding="utf-8") as data:
        if file.suffix != ".jsonl":
            yield data.read(1 << 20)
            return
        for line in data:
            conversation = json.loads(line)
            yield str(conversation.get("tools", ""))
            yield from (turn["value"] + "\n" for turn in conversation.get("conversations", []))
