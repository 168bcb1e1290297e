"""A model that is its own draft model too, loaded once; fresh drafters for it, and what each request drafted, and when."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from engine import datastore
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import StepPlan, StepResult
from engine.protocols import Drafter
from engine.registry import make_drafter
from engine.request import Request
from engine.worker import Worker
from tests.engine.models import tiny
from tests.engine.real import answers, make_engine, request
from tests.prompts import PROMPTS

UNPACED = 1 << 20  # tokens


@dataclass
class House:
    """`prompts` in the model's ids, 16 of them; `texts`: what the model answers to them, greedy; `store` knows half of those."""

    worker: Worker
    prompts: list[list[int]]
    texts: list[list[int]]
    store: Path

    def drafter(self, name: str, **options: Any) -> Drafter:
        """A fresh one, that has seen nothing."""
        info = self.worker.info
        offers = {
            "vocab_size": info.vocab_size,
            "eos_ids": frozenset(info.eos_ids),
            "datastore": str(self.store),
            "draft_model": self._draft_model,
        }
        if name != "draft_model":
            return make_drafter(name, offers, **options)
        made: Any = make_drafter(name, offers, catch_up=UNPACED, catch_up_seconds=1e9, **options)
        made._pace.limit = UNPACED  # how much is caught up in one step would be a matter of time
        self._draft_model.clear(list(range(info.num_blocks)))  # or what an earlier test wrote there could be right by chance
        return made  # type: ignore[no-any-return]

    def request(self, index: int, max_tokens: int, name: str = "", **params: Any) -> Request:
        """Prompt `index`, with a salt of its own and a prediction that is right but for one token."""
        guess = list(self.texts[index])
        guess[len(guess) // 2] ^= 1
        name = f"{name}{index}"
        settings = {"temperature": 0.0, "ignore_eos": True} | params
        return request(
            name, self.prompts[index], max_tokens=max_tokens, seed=index, cache_salt=name, prediction_ids=guess, **settings
        )

    def __post_init__(self) -> None:
        self._draft_model = self.worker.drafting.drafters[0]._model  # type: ignore[attr-defined]  # the drafter draft_model


def tiny_house(folder: Path) -> House:
    """Random weights, random prompts."""
    path = tiny.save(tiny.model(tiny.config("Llama", max_position_embeddings=512)), folder / "model")
    rng = random.Random(0)
    return _house(path, folder, [[rng.randrange(3, 96) for _ in range(rng.randrange(5, 50))] for _ in range(16)], 4 << 20)


def real_house(path: Path, folder: Path) -> House:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    asked = PROMPTS[:: max(len(PROMPTS) // 16, 1)][:16]
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in asked]
    return _house(path, folder, [tokenizer.encode(chat).ids for chat in chats], 1 << 30)


def _house(path: Path, folder: Path, prompts: list[list[int]], kv_bytes: int) -> House:
    worker = Worker(
        EngineConfig(
            model=str(path), draft_model=str(path), drafters=["draft_model"], policy="fixed", dtype="float32", num_threads=1,
            block_size=8, profile=False, kv_cache_memory_bytes=kv_bytes, max_num_batched_tokens=4096,
        )
    )  # fmt: skip
    store = folder / "texts"
    house = House(worker, prompts, [[0]] * len(prompts), store)
    said = answers(make_engine(worker), [house.request(i, 32) for i in range(len(prompts))])
    house.texts = [said[f"{i}", 0].tokens for i in range(len(prompts))]
    datastore.build(store, house.texts[::2], worker.info.vocab_size, b"f" * 32)
    return house


@dataclass
class Tally:
    """(drafted, accepted) in every judged step of a request, by request and by `phase`."""

    phase: str = ""
    steps: dict[tuple[str, str], list[tuple[int, int]]] = field(default_factory=dict)

    def watch(self, engine: Engine) -> Tally:
        executor: Any = engine.executor
        execute, seqs = executor.execute, executor.worker.seqs

        def watched(plan: StepPlan) -> StepResult:
            result: StepResult = execute(plan)
            for row in result.rows:
                if row.token_ids:
                    name = seqs[row.seq_id].request.request_id
                    self.steps.setdefault((name, self.phase), []).append((row.num_draft, row.num_accepted))
            return result

        executor.execute = watched
        return self

    def of(self, name: str) -> list[tuple[int, int]]:
        """All steps of a request."""
        return [step for (whose, _), steps in self.steps.items() if whose == name for step in steps]

    def counts(self, phase: str, names: Seq[str] = ()) -> tuple[int, int, int]:
        """Draft nodes shown and accepted, and steps of a sequence, in a phase: of the requests named, or of all."""
        mine = {key: steps for key, steps in self.steps.items() if key[1] == phase and (not names or key[0] in names)}
        found = [step for steps in mine.values() for step in steps]
        return sum(drafted for drafted, _ in found), sum(accepted for _, accepted in found), len(found)

    def acceptance(self, phase: str, names: Seq[str] = ()) -> float:
        drafted, accepted, _ = self.counts(phase, names)
        return accepted / drafted


def through_a_spike(engine: Engine, few: Seq[Request], many: Seq[Request], steps: int) -> Tally:
    """`few` alone for so many steps, then beside `many` until those have ended, then alone again, to their end.

    Phases: "before", "spike" (everybody is decoding), "drain" (the first of the many have ended), "after".
    """
    tally = Tally("before").watch(engine)
    for one in few:
        engine.add(one)
    for _ in range(steps):
        engine.step()
    tally.phase = "spike"
    for one in many:
        engine.add(one)
    left = {one.request_id for one in many}
    while left:
        left -= {delta.request_id for delta in engine.step() if delta.finish_reason}
        tally.phase = "spike" if len(left) == len(many) else "drain"
    assert engine.stats().running == len(few), "the few have to outlive the spike"
    tally.phase = "after"
    while engine.has_work():
        engine.step()
    assert engine.stats().drafter_fallbacks == {}
    return tally
