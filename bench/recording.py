"""Real continuations, recorded once, so that drafters can be replayed over them without a model.

A recording is a JSON-lines file: prompt and answer ids of one sequence per line and, where a model recorded it, the ids and
raw logits of the likeliest tokens of the row behind every answer token. `record` runs the engine without speculation;
`from_texts` takes prompt and answer from a data file, with no rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from bench.prompts import Prompt
from engine import registry
from engine.config import EngineConfig
from engine.engine import Engine
from engine.executors.local import LocalExecutor
from engine.protocols import Observed, Siblings, Signals
from engine.request import Request, SamplingParams
from engine.sequence import Sequence as TokenSequence
from engine.tree import DraftForest, Verdict
from server.tokenizer import Tokenizer

TOP = 8
LONGEST_PROMPT = 600  # tokens; longer prompts are left out


class Recorded(msgspec.Struct):
    """One sequence: top_ids and top_logits [len(answer), TOP] are the rows that the answer's tokens were taken from."""

    id: str
    category: str
    temperature: float
    seed: int
    sample: int
    prompt: list[int]
    answer: list[int]
    top_ids: list[list[int]] = []
    top_logits: list[list[float]] = []


class RecordingDrafter:
    """Drafts nothing and writes down the likeliest tokens of every row."""

    name = "recording"
    needs = Signals(top_k=TOP)
    siblings = Siblings.POINT
    rows: ClassVar[dict[tuple[str, int], list[tuple[list[int], list[float]]]]] = {}

    def draft(self, seqs: Sequence[TokenSequence], budgets: Sequence[int]) -> DraftForest:
        return DraftForest.roots([seq.tokens[-1] for seq in seqs])

    def observe(self, seqs: Sequence[TokenSequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        if signals.top_ids is None or signals.top_logits is None:
            raise ValueError("the rows of this step are missing")
        ids, logits = signals.top_ids.tolist(), signals.top_logits.float().tolist()
        for seq, row in zip(seqs, forest.start.tolist(), strict=False):
            self.rows.setdefault((seq.request.request_id, seq.sample_index), []).append((ids[row], logits[row]))

    def forget(self, seq_id: int) -> None:
        """The rows are what this is for."""


def record(
    model: str, prompts: Iterable[Prompt], length: int, temperatures: Sequence[float], samples: int, threads: int | None = None
) -> list[Recorded]:
    """Ask the model, undrafted: one greedy answer and `samples` of each other temperature per prompt, up to `length` tokens."""
    RecordingDrafter.rows.clear()
    config = EngineConfig(model=model, drafters=["recording"], policy="off", max_num_seqs=24, num_threads=threads, profile=False)
    with registry.lent("drafter", "recording", "bench.recording:RecordingDrafter"):
        engine = Engine(config, LocalExecutor(config))
    tokenizer = Tokenizer.load(model)
    asked: dict[str, tuple[Prompt, Request]] = {}
    for number, prompt in enumerate(prompts):
        ids = tokenizer.render_chat_ids(prompt.messages)
        for temperature in temperatures if len(ids) <= LONGEST_PROMPT else ():
            params = SamplingParams(max_tokens=length, seed=1000 + number, temperature=temperature)
            request = Request(
                request_id=f"{prompt.id} T={temperature}", prompt_ids=ids, params=params, n=samples if temperature else 1
            )
            asked[request.request_id] = prompt, request
            engine.add(request)
    answers: dict[tuple[str, int], list[int]] = {}
    while engine.has_work():
        for delta in engine.step():
            answers.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
    found = []
    for (name, sample), answer in sorted(answers.items()):
        prompt, request = asked[name]
        rows = RecordingDrafter.rows[name, sample][: len(answer)]
        found.append(
            Recorded(
                id=prompt.id, category=prompt.category, temperature=request.params.temperature, seed=request.params.seed,
                sample=sample, prompt=request.prompt_ids, answer=answer,
                top_ids=[ids for ids, _ in rows], top_logits=[[round(x, 3) for x in logits] for _, logits in rows],
            )
        )  # fmt: skip
    engine.close()
    return found


def write(path: Path, sequences: Iterable[Recorded]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(msgspec.json.encode(sequence) + b"\n" for sequence in sequences))


def read(path: Path) -> list[Recorded]:
    """Raises OSError and ValueError (with the line's number) for what is no recording."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(msgspec.json.decode(line, type=Recorded))
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return found


def from_texts(path: Path, tokenizer: Tokenizer, most: int) -> list[Recorded]:
    """The first `most` prompts with their written answers of HumanEval, GSM8K or ShareGPT-like conversations, as greedy answers.

    Raises ValueError for another shape.
    """
    found = []
    with path.open(encoding="utf-8") as lines:
        for number, line in zip(range(most), lines, strict=False):
            for turn, (prompt, answer) in enumerate(_pairs(json.loads(line))):
                name = f"{path.stem}-{number}.{turn}"
                ids = tokenizer.encode(prompt), tokenizer.encode(answer, add_special_tokens=False)
                found.append(Recorded(name, path.stem, 0.0, 0, 0, *ids))
    return [one for one in found if one.prompt and one.answer]


def _pairs(line: dict[str, Any]) -> list[tuple[str, str]]:
    if "canonical_solution" in line:
        return [(line["prompt"], line["canonical_solution"])]
    if "question" in line and "answer" in line:
        return [(line["question"] + "\n", line["answer"])]
    turns = line.get("conversations", [])
    if turns:
        text, pairs = str(line.get("tools", "")), []
        for turn in turns:
            if turn.get("from") in ("gpt", "function_call"):
                pairs.append((text, turn["value"]))
            text += "\n" + turn["value"]
        return pairs
    raise ValueError("neither HumanEval, nor GSM8K, nor a conversation")
