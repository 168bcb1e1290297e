"""A drafter that goes wrong costs its guess for one step: the request goes on, the answer stays, the reason is counted."""

from __future__ import annotations

import random
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.drafting import Drafting
from engine.engine import Engine
from engine.protocols import Drafter, Observed
from engine.request import Request
from engine.resting import FIRST_REST
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.worker import Worker
from tests.engine.real import Answer, OracleDrafter, answers, load_worker, make_engine, request

MAX_TOKENS = 24
HANG_SECONDS = 5.0
Key = tuple[str, int]


@pytest.fixture(scope="module")
def worker(tiny_llama_dir: Path) -> Worker:
    return load_worker(tiny_llama_dir)


@pytest.fixture(scope="module")
def requests(worker: Worker) -> list[Request]:
    rng = random.Random(4)
    return [
        request(
            f"r{i}",
            [rng.randrange(3, worker.info.vocab_size) for _ in range(10 + i)],
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            seed=i,
            temperature=(0.0, 0.9)[i % 2],
        )
        for i in range(4)
    ]


@pytest.fixture(scope="module")
def plain(worker: Worker, requests: list[Request]) -> dict[Key, Answer]:
    """The same requests without speculation."""
    return answers(make_engine(worker), requests)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


Fault = Callable[[DraftForest], DraftForest]


class Faulty(OracleDrafter):
    """Right in all that it drafts, until its call number `at`: then `fault` makes of its forest what it likes."""

    name = "faulty"

    def __init__(
        self, worker: Worker, plain: dict[Key, Answer], fault: Fault, at: Callable[[int], bool] = lambda call: call == 3
    ) -> None:
        super().__init__(worker.info.vocab_size, {key: answer.tokens for key, answer in plain.items()})
        self.fault, self.at, self.calls = fault, at, 0

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        self.calls += 1
        forest = super().draft(seqs, budgets)
        forest.confidence = np.full(forest.num_nodes, 0.5, np.float32)
        return self.fault(forest) if self.at(self.calls) else forest


def raises(forest: DraftForest) -> DraftForest:
    raise RuntimeError("draft went wrong")


def recurses(forest: DraftForest) -> DraftForest:
    return recurses(forest)


def nothing(forest: DraftForest) -> DraftForest:
    return None  # type: ignore[return-value]  # what a careless drafter may do


def huge_ids(forest: DraftForest) -> DraftForest:
    forest.token[-1] = 1 << 30
    return forest


def ids_just_outside(vocab_size: int) -> Fault:
    def fault(forest: DraftForest) -> DraftForest:
        forest.token[-1] = vocab_size
        return forest

    return fault


def negative_ids(forest: DraftForest) -> DraftForest:
    forest.token[-1] = -1
    return forest


def other_roots(forest: DraftForest) -> DraftForest:
    forest.token[forest.start[:-1]] += 1
    return forest


def loops(forest: DraftForest) -> DraftForest:
    forest.parent[-1] = forest.size(forest.num_trees - 1) - 1
    return forest


def parents_elsewhere(forest: DraftForest) -> DraftForest:
    forest.parent[-1] = 1 << 20
    return forest


def wrong_depths(forest: DraftForest) -> DraftForest:
    """Positions follow from depths."""
    forest.depth[-1] += 1
    return forest


def one_tree_less(forest: DraftForest) -> DraftForest:
    return DraftForest.roots(forest.token[forest.start[:-2]].tolist())


def over_budget(forest: DraftForest) -> DraftForest:
    roots = forest.token[forest.start[:-1]].tolist()
    return DraftForest.from_chains(roots, [[5] * 500] * len(roots))


def cut_short(forest: DraftForest) -> DraftForest:
    return replace(forest, token=forest.token[:-1])


def few_confidences(forest: DraftForest) -> DraftForest:
    return replace(forest, confidence=np.ones(1, np.float32))


def starts_backwards(forest: DraftForest) -> DraftForest:
    return replace(forest, start=forest.start[::-1].copy())


def floats(forest: DraftForest) -> DraftForest:
    """The right numbers, but not to be counted with."""
    return replace(forest, token=forest.token.astype(np.float64), parent=forest.parent.astype(np.float64))  # type: ignore[arg-type]


def no_numbers(forest: DraftForest) -> DraftForest:
    tokens = forest.token.astype(np.float64)
    tokens[-1] = np.nan
    return replace(forest, token=tokens)  # type: ignore[arg-type]


def few_names(forest: DraftForest) -> DraftForest:
    return replace(forest, node_drafter=["faulty"])


def lists(forest: DraftForest) -> DraftForest:
    return replace(forest, token=forest.token.tolist(), parent=forest.parent.tolist())  # type: ignore[arg-type]


def tensors(forest: DraftForest) -> DraftForest:
    return replace(forest, token=torch.from_numpy(forest.token))  # type: ignore[arg-type]


FAULTS: dict[str, tuple[Fault, set[str]]] = {
    "raises": (raises, {"raised"}),
    "recurses": (recurses, {"raised"}),
    "answers nothing": (nothing, {"raised"}),
    "huge ids": (huge_ids, {"vocabulary"}),
    "negative ids": (negative_ids, {"vocabulary"}),
    "other roots": (other_roots, {"malformed", "vocabulary"}),
    "a node that is its own parent": (loops, {"malformed"}),
    "parents elsewhere": (parents_elsewhere, {"malformed"}),
    "wrong depths": (wrong_depths, {"malformed"}),
    "one tree less": (one_tree_less, {"malformed"}),
    "over its budget": (over_budget, {"malformed"}),
    "cut short": (cut_short, {"malformed"}),
    "few confidences": (few_confidences, {"malformed"}),
    "starts backwards": (starts_backwards, {"malformed", "raised"}),
    "floats": (floats, {"malformed", "raised"}),
    "ids that are no numbers": (no_numbers, {"malformed", "vocabulary", "raised"}),
    "few names": (few_names, {"malformed"}),
    "lists": (lists, {"malformed", "raised"}),
    "tensors": (tensors, {"malformed", "raised"}),
}


def run(engine: Engine, requests: list[Request]) -> tuple[dict[Key, Answer], int]:
    return answers(engine, requests), engine.stats().steps


def tokens(found: dict[Key, Answer]) -> dict[Key, list[int]]:
    return {key: answer.tokens for key, answer in found.items()}


def nicely(worker: Worker, requests: list[Request], plain: dict[Key, Answer]) -> int:
    """The steps that the same drafter takes when it does nothing wrong."""
    found, steps = run(make_engine(worker, [Faulty(worker, plain, raises, lambda call: False)]), requests)
    assert tokens(found) == tokens(plain)
    return steps


@pytest.mark.parametrize("name", FAULTS)
def test_one_fault_costs_one_step(name: str, worker: Worker, requests: list[Request], plain: dict[Key, Answer]) -> None:
    fault, reasons = FAULTS[name]
    drafter = Faulty(worker, plain, fault)
    engine = make_engine(worker, [drafter])
    found, steps = run(engine, requests)
    assert tokens(found) == tokens(plain)
    assert all(answer.finish_reason == "length" for answer in found.values())
    fallbacks = engine.stats().drafter_fallbacks
    assert sum(fallbacks.values()) == 1 and set(fallbacks) <= reasons
    # Its next guess is taken again: the request is not decoded without drafts from then on.
    assert sum(answer.usage.accepted_tokens for answer in found.values() if answer.usage) > len(found)
    # The oracle flips coins as it builds its trees: a run with one step less drafted may flip them otherwise.
    assert steps <= nicely(worker, requests, plain) + 4


def test_an_id_just_outside_the_vocabulary(worker: Worker, requests: list[Request], plain: dict[Key, Answer]) -> None:
    engine = make_engine(worker, [Faulty(worker, plain, ids_just_outside(worker.info.vocab_size))])
    assert tokens(run(engine, requests)[0]) == tokens(plain)
    assert engine.stats().drafter_fallbacks == {"vocabulary": 1}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_every_step_is_plain_decoding(
    name: str, worker: Worker, requests: list[Request], plain: dict[Key, Answer]
) -> None:
    drafter = Faulty(worker, plain, FAULTS[name][0], lambda call: True)
    engine = make_engine(worker, [drafter])
    found, _ = run(engine, requests)
    assert tokens(found) == tokens(plain)
    # (An oracle that chose to draft nothing has nothing to spoil for some of these faults.)
    assert drafter.calls - 3 <= sum(engine.stats().drafter_fallbacks.values()) <= drafter.calls


def test_the_other_drafter_is_asked_instead(worker: Worker, requests: list[Request], plain: dict[Key, Answer]) -> None:
    bad = Faulty(worker, plain, raises, lambda call: True)
    good = OracleDrafter(worker.info.vocab_size, {key: answer.tokens for key, answer in plain.items()})
    found, steps = run(make_engine(worker, [bad, good]), requests)
    assert tokens(found) == tokens(plain)
    assert all(answer.usage is not None and set(answer.usage.accepted_by) == {"oracle"} for answer in found.values())
    assert steps < MAX_TOKENS


def with_clock(worker: Worker, drafters: list[Drafter], clock: Clock) -> Engine:
    engine = make_engine(worker, drafters)
    worker.drafting = Drafting(drafters, worker.info.vocab_size, clock=clock)
    return engine


def test_one_that_hangs_costs_one_step_and_rests(worker: Worker, requests: list[Request], plain: dict[Key, Answer]) -> None:
    clock = Clock()

    def hangs(forest: DraftForest) -> DraftForest:
        clock.now += HANG_SECONDS
        return forest

    drafter = Faulty(worker, plain, hangs, lambda call: call in (3, 4, 5))
    engine = with_clock(worker, [drafter], clock)
    found, _ = run(engine, requests)
    assert tokens(found) == tokens(plain)
    assert engine.stats().drafter_fallbacks == {"slow": 1}
    assert drafter.calls == 3 and clock.now == 1000.0 + HANG_SECONDS  # never waited for again
    # It is tried again after its rest, and rests twice as long.
    for rest, calls in ((FIRST_REST, 4), (2 * FIRST_REST, 5)):
        clock.now += rest - 1
        assert tokens(run(engine, requests)[0]) == tokens(plain) and drafter.calls == calls - 1
        clock.now += 2
        assert tokens(run(engine, requests)[0]) == tokens(plain) and drafter.calls == calls
    assert engine.stats().drafter_fallbacks == {"slow": 3}
    clock.now += 4 * FIRST_REST + 1
    found, _ = run(engine, requests)
    assert tokens(found) == tokens(plain) and drafter.calls > 6
    assert engine.stats().drafter_fallbacks == {"slow": 3}


class Unlearning(OracleDrafter):
    """Drafts well, cannot observe nor forget."""

    name = "unlearning"

    def __init__(self, worker: Worker, plain: dict[Key, Answer], clock: Clock | None = None) -> None:
        super().__init__(worker.info.vocab_size, {key: answer.tokens for key, answer in plain.items()})
        self.clock, self.observed, self.forgotten = clock, 0, 0

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        self.observed += 1
        if self.clock is None:
            raise RuntimeError("observe went wrong")
        self.clock.now += HANG_SECONDS

    def forget(self, seq_id: int) -> None:
        self.forgotten += 1
        raise RuntimeError("forget went wrong")


def test_faults_while_learning(worker: Worker, requests: list[Request], plain: dict[Key, Answer]) -> None:
    drafter = Unlearning(worker, plain)
    engine = make_engine(worker, [drafter])
    found, steps = run(engine, requests)
    assert tokens(found) == tokens(plain) and steps < MAX_TOKENS
    # What ended with the last step is forgotten with the next plan.
    again, _ = run(engine, requests)
    assert tokens(again) == tokens(plain)
    assert drafter.forgotten >= len(requests)
    assert engine.stats().drafter_fallbacks == {"raised": drafter.observed + drafter.forgotten}


def test_one_that_hangs_while_learning_rests(worker: Worker, requests: list[Request], plain: dict[Key, Answer]) -> None:
    clock = Clock()
    drafter = Unlearning(worker, plain, clock)
    engine = with_clock(worker, [drafter], clock)
    found, _ = run(engine, requests)
    assert tokens(found) == tokens(plain)
    assert drafter.observed == 1 and engine.stats().drafter_fallbacks == {"slow": 1, "raised": drafter.forgotten}


@pytest.mark.parametrize("policy", ["fixed", "goodput"])
def test_a_confidence_that_is_no_number(policy: str, worker: Worker, requests: list[Request], plain: dict[Key, Answer]) -> None:
    """Confidence decides what is shown to the target, never what the target says of it."""

    def not_numbers(forest: DraftForest) -> DraftForest:
        values = np.resize(np.array([np.nan, np.inf, -3.0, 7.0], np.float32), forest.num_nodes)
        return replace(forest, confidence=values)

    drafter = Faulty(worker, plain, not_numbers, lambda call: True)
    good = OracleDrafter(worker.info.vocab_size, {key: answer.tokens for key, answer in plain.items()}, seed=1)
    for drafters in ([drafter], [drafter, good]):
        engine = make_engine(worker, drafters, policy=policy)
        assert tokens(run(engine, requests)[0]) == tokens(plain)
