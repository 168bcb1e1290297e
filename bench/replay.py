"""Any drafter over recorded real continuations, without a model: tokens per step, time per draft, memory, calibration.

    python -m bench.replay record MODEL [--out FILE]    ask a model once (greedy and sampled) and keep its rows
    python -m bench.replay run FILE --drafters a,b      a recording, or a data file with written answers

Every answer is drafted for step by step as the engine would: the drafts that the recorded tokens follow stand, the next token is
the bonus. One sequence runs at a time. `first` is the first time an answer is asked for (a sampled answer follows the greedy one
to the same prompt), `again` the second, by the same drafter with what it kept. Times are CPU time of the thread. Rows of draft
nodes that did not stand are unknown here, so a drafter that also learns from those (token_recycling, stand) learns less than in
a real run. The whole budget is drafted: no policy, no cost of verifying.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.prompts import load, mixed
from bench.recording import Recorded, from_texts, read, record, write
from bench.summary import markdown
from engine.protocols import Drafter, Observed
from engine.registry import make_drafter
from engine.request import Request, SamplingParams
from engine.sequence import Sequence as TokenSequence
from engine.tree import DraftForest, Verdict

BUCKETS = 10


@dataclasses.dataclass(slots=True)
class Tally:
    """Counts of one group of answers."""

    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    observe_seconds: float = 0.0
    judged: list[int] = dataclasses.field(default_factory=lambda: [0] * BUCKETS)  # nodes below one that stood, by confidence
    stood: list[int] = dataclasses.field(default_factory=lambda: [0] * BUCKETS)
    predicted: list[float] = dataclasses.field(default_factory=lambda: [0.0] * BUCKETS)

    def add(self, other: Tally) -> None:
        for field in dataclasses.fields(self):
            mine: Any = getattr(self, field.name)
            theirs: Any = getattr(other, field.name)
            added = [a + b for a, b in zip(mine, theirs, strict=True)] if isinstance(mine, list) else mine + theirs
            setattr(self, field.name, added)

    @property
    def calibration_error(self) -> float:
        """Mean |predicted - observed| over the buckets of confidence, weighted by their nodes; NaN where nothing was judged."""
        total = sum(self.judged)
        return sum(abs(p - s) for p, s in zip(self.predicted, self.stood, strict=True)) / total if total else float("nan")


def replay(drafter: Drafter, recorded: Recorded, seq_id: int, budget: int, salt: str = "") -> Tally:
    """Run one answer through a drafter; what came of it."""
    params = SamplingParams(max_tokens=len(recorded.answer), temperature=recorded.temperature, seed=recorded.seed)
    request = Request(request_id=recorded.id, prompt_ids=recorded.prompt, params=params, cache_salt=salt)
    seq = TokenSequence(seq_id, request, recorded.sample)
    top_ids = torch.tensor(recorded.top_ids, dtype=torch.int64)
    top_logits = torch.tensor(recorded.top_logits)
    tally = Tally()
    while seq.num_output < len(recorded.answer):
        truth = recorded.answer[seq.num_output :]
        began = time.thread_time()
        forest = drafter.draft([seq], [min(budget, len(truth) - 1)])
        tally.draft_seconds += time.thread_time() - began
        path = judge(forest, truth, tally)
        kept = np.zeros(forest.num_nodes, dtype=bool)
        kept[[0, *path]] = True
        tokens = truth[: len(path) + 1]
        rows = slice(seq.num_output, seq.num_output + len(path) + 1)
        observed = Observed(top_ids[rows], top_logits[rows]) if recorded.top_ids else Observed()
        began = time.thread_time()
        drafter.observe([seq], forest.keep(kept), Verdict([list(range(1, len(path) + 1))], [tokens]), observed)
        tally.observe_seconds += time.thread_time() - began
        seq.commit(tokens)
        tally.tokens += len(tokens)
        tally.steps += 1
        tally.drafted += forest.num_drafts
        tally.accepted += len(path)
    drafter.forget(seq_id)
    return tally


def judge(forest: DraftForest, truth: Sequence[int], tally: Tally) -> list[int]:
    """The nodes that the recorded tokens follow; counts how the confidence of every judged node bore out."""
    tokens, parents = forest.token.tolist(), forest.parent.tolist()
    confidence = [] if forest.confidence is None else forest.confidence.tolist()
    path, node = [], 0
    for token in truth:
        below = [i for i in range(node + 1, len(tokens)) if parents[i] == node]
        for i in below if confidence else ():
            bucket = min(int(confidence[i] * BUCKETS), BUCKETS - 1)
            tally.judged[bucket] += 1
            tally.predicted[bucket] += confidence[i]
            tally.stood[bucket] += tokens[i] == token
        node = next((i for i in below if tokens[i] == token), 0)
        if not node:
            break
        path.append(node)
    return path


def rounds(
    drafter: Drafter, recorded: Sequence[Recorded], budget: int, again: bool = True
) -> dict[tuple[str, str, float], Tally]:
    """(first or again, category, temperature) -> its tally: all answers once and, greedy ones, a second time."""
    found: dict[tuple[str, str, float], Tally] = {}
    number = 0
    for name in ("first", "again")[: 1 + again]:
        for one in recorded:
            if name == "again" and one.temperature > 0:
                continue  # asked again, it would be sampled with another seed
            number += 1
            found.setdefault((name, one.category, one.temperature), Tally()).add(replay(drafter, one, number, budget))
    return found


def total(tallies: Iterable[Tally]) -> Tally:
    found = Tally()
    for tally in tallies:
        found.add(tally)
    return found


HEADING = [
    "drafter",
    "asked",
    "T",
    "category",
    "tokens/step",
    "accepted %",
    "drafted/step",
    "us/draft",
    "us/observe",
    "calibration",
]


def cells(drafter: str, group: tuple[str, str, float], tally: Tally) -> list[str]:
    asked, category, temperature = group
    return [
        drafter,
        asked,
        f"{temperature:g}",
        category,
        f"{tally.tokens / tally.steps:.2f}",
        f"{100 * tally.accepted / tally.drafted:.0f}" if tally.drafted else "-",
        f"{tally.drafted / tally.steps:.1f}",
        f"{1e6 * tally.draft_seconds / tally.steps:.0f}",
        f"{1e6 * tally.observe_seconds / tally.steps:.0f}",
        f"{tally.calibration_error:.2f}" if sum(tally.judged) else "-",
    ]


def table(drafter: str, found: dict[tuple[str, str, float], Tally], categories: bool) -> list[list[str]]:
    rows = []
    for name, temperature in sorted({(name, t) for name, _, t in found}, key=lambda k: (k[1], k[0] == "again")):
        groups = {key: tally for key, tally in found.items() if key[0] == name and key[2] == temperature}
        if categories:
            rows += [cells(drafter, key, tally) for key, tally in groups.items()]
        rows.append(cells(drafter, (name, "all", temperature), total(groups.values())))
    return rows


def held_bytes(make: Any, recorded: Sequence[Recorded], budget: int) -> int:
    """Bytes that the drafter holds on to after all answers, as tracemalloc counts them."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    drafter = make()
    rounds(drafter, recorded, budget, again=False)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    return held


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("record", help="record a model's answers").add_argument
    add("model", help="Hugging Face directory or GGUF file")
    add("--out", type=Path, default=Path("bench/out/replay.jsonl"))
    add("--prompts", type=Path, help="a file of questions (default: our own)")
    add("--most", type=int, default=28, help="prompts, their categories taking turns")
    add("--tokens", type=int, default=128, help="of each answer")
    add("--threads", type=int, help="default: all cores")
    add("--samples", type=int, default=2, help="answers per prompt at T = 0.7")
    add = commands.add_parser("run", help="replay drafters").add_argument
    add("file", type=Path, help="a recording, or a data file with written answers")
    add("--model", help="whose tokenizer reads a data file")
    add("--most", type=int, default=100, help="lines of a data file")
    add("--drafters", default="ngram,suffix,token_recycling,stand,aded")
    add("--budget", type=int, default=8)
    add("--options", default="", help="name=number,... for every drafter's constructor")
    add("--datastore", type=Path, help="for drafters that need one (outrider datastore build)")
    add("--categories", action="store_true", help="a row per category")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "record":
        prompts = mixed(load(options.prompts) if options.prompts else load())[: options.most]
        found = record(options.model, prompts, options.tokens, [0.0, 0.7], options.samples, options.threads)
        write(options.out, found)
        print(f"{len(found)} answers, {sum(len(one.answer) for one in found)} tokens: {options.out}")
        return 0
    recorded = _load(options.file, options.model, options.most)
    extra: dict[str, Any] = {key: float(number) if "." in number else int(number) for key, number in _pairs(options.options)}
    offers = {"datastore": options.datastore}
    rows = [HEADING]
    memory = []
    for name in options.drafters.split(","):
        rows += table(name, rounds(make_drafter(name, offers, **extra), recorded, options.budget), options.categories)
        held = held_bytes(lambda name=name: make_drafter(name, offers, **extra), recorded, options.budget)
        memory.append(f"{name} {held / 1024:.0f} KiB")
    print(markdown(rows))
    tokens = sum(len(one.prompt) + len(one.answer) for one in recorded)
    print(f"\nheld after {len(recorded)} answers ({tokens} tokens, prompts included): {', '.join(memory)}")
    return 0


def _load(path: Path, model: str | None, most: int) -> list[Recorded]:
    if model is None:
        return read(path)
    from server.tokenizer import Tokenizer

    return from_texts(path, Tokenizer.load(model), most)


def _pairs(text: str) -> list[tuple[str, str]]:
    return [(key, number) for key, _, number in (part.partition("=") for part in text.split(",") if part)]


if __name__ == "__main__":
    sys.exit(main())
