"""The contract of a drafter, for every one in the registry: a new one is picked up by its line there.

The target is a toy whose next token depends on the last two, so that whoever learns has something to learn. Drafters that
need a model of their own are left to their own tests.
"""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import datastore
from engine.protocols import Drafter, Observed
from engine.registry import DRAFTERS, make_drafter
from engine.request import Request, SamplingParams
from engine.sequence import Sequence as Seq
from engine.tree import DraftForest, Verdict

VOCAB = 60
NEED_A_MODEL = {"draft_model"}
NAMES = sorted(set(DRAFTERS) - NEED_A_MODEL)
LIMIT = 200_000
LOGITS = 3 * np.random.default_rng(0).standard_normal((VOCAB, VOCAB, VOCAB)).astype(np.float32)  # by the last two tokens


@pytest.fixture(scope="module")
def offers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path: Path = tmp_path_factory.mktemp("store") / "texts"
    rng = random.Random(0)
    datastore.build(path, [[rng.randrange(VOCAB) for _ in range(40)] for _ in range(5)], VOCAB, b"f" * 32)
    return {
        "vocab_size": VOCAB,
        "eos_ids": frozenset({1}),
        "memory_bytes": LIMIT,
        "datastore": str(path),
        "draft_model": None,
    }


def sequence(seq_id: int, prompt: Sequence[int], salt: str = "", temperature: float = 0.0, sample: int = 0) -> Seq:
    params = SamplingParams(max_tokens=10_000, temperature=temperature, seed=5, ignore_eos=True)
    request = Request(
        request_id=f"r{seq_id}", prompt_ids=list(prompt), params=params, cache_salt=salt, prediction_ids=[3, 4, 5, 6]
    )
    return Seq(seq_id, request, sample)


def prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(length)] for _ in range(count)]


def check(forest: DraftForest, seqs: Sequence[Seq], budgets: Sequence[int], name: str) -> None:
    assert forest.num_trees == len(seqs)
    assert len(forest.token) == len(forest.parent) == len(forest.depth) == forest.num_nodes
    for b, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
        part = forest.nodes(b)
        tokens, parents, depths = forest.token[part].tolist(), forest.parent[part].tolist(), forest.depth[part].tolist()
        assert len(tokens) - 1 <= budget
        assert tokens[0] == seq.tokens[-1] and parents[0] == -1 and depths[0] == 0
        assert forest.drafter[b] == (name if len(tokens) > 1 else "")
        for node in range(1, len(tokens)):
            assert 0 <= parents[node] < node
            assert depths[node] == depths[parents[node]] + 1
            assert 0 <= tokens[node] < VOCAB
        assert len(set(zip(parents[1:], tokens[1:], strict=True))) == len(tokens) - 1, "siblings are distinct"
    if forest.confidence is not None:
        assert forest.confidence.shape == forest.token.shape
        assert ((forest.confidence >= 0) & (forest.confidence <= 1 + 1e-6)).all()
        assert (forest.confidence[forest.start[:-1]] == 1).all()


def step(drafter: Drafter, seqs: Sequence[Seq], budgets: Sequence[int]) -> int:
    """Draft, judge and commit once for all of them; how many draft nodes stood."""
    forest = drafter.draft(seqs, budgets)
    check(forest, seqs, budgets, drafter.name)
    rows, nodes, tokens = [], [], []
    for b, seq in enumerate(seqs):
        first = int(forest.start[b])
        contexts = [[0, *seq.tokens[-2:], *forest.path(b, node)] for node in range(forest.size(b))]
        logits = [LOGITS[tuple(context[-2:])] for context in contexts]
        rows += logits
        part = forest.nodes(b)
        children = {
            (int(parent), int(token)): node
            for node, (parent, token) in enumerate(zip(forest.parent[part], forest.token[part], strict=True))
        }
        node, path, verdict = 0, [], []
        while True:
            verdict.append(int(logits[node].argmax()))
            below = children.get((node, verdict[-1]))
            if below is None:
                break
            node = below
            path.append(node)
        nodes.append(path)
        tokens.append(verdict)
        assert first + forest.size(b) == int(forest.start[b + 1])
    drafter.observe(seqs, forest, Verdict(nodes, tokens), signals(drafter, np.stack(rows)))
    for seq, verdict in zip(seqs, tokens, strict=True):
        seq.commit(verdict)
    return sum(map(len, nodes))


def signals(drafter: Drafter, logits: np.ndarray) -> Observed:
    observed, needs = Observed(), drafter.needs
    assert not needs.hidden_layers, "this toy has no layers: give it some"
    if needs.top_k:
        observed.top_logits, observed.top_ids = torch.topk(torch.from_numpy(logits), needs.top_k)
    if needs.probabilities:
        observed.probabilities = torch.softmax(torch.from_numpy(logits), -1)
    return observed


def run(drafter: Drafter, seqs: Sequence[Seq], steps: int, seed: int = 0, most: int = 12) -> int:
    rng = random.Random(seed)
    return sum(step(drafter, seqs, [rng.randint(0, most) for _ in seqs]) for _ in range(steps))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", NAMES)
def test_trees_are_well_formed_and_within_their_budgets(name: str, temperature: float, offers: dict[str, Any]) -> None:
    drafter = make_drafter(name, offers)
    assert drafter.name == name
    seqs = [sequence(i, prompt, temperature=temperature, sample=i % 2) for i, prompt in enumerate(prompts(6, 30))]
    seqs += [sequence(7, [4]), sequence(8, [4, 4])]  # prompts too short for any n-gram
    run(drafter, seqs, 25)
    check(drafter.draft([], []), [], [], name)
    for seq in seqs:
        drafter.forget(seq.seq_id)


@pytest.mark.parametrize("name", NAMES)
def test_no_budget_no_nodes(name: str, offers: dict[str, Any]) -> None:
    drafter = make_drafter(name, offers)
    seqs = [sequence(i, prompt) for i, prompt in enumerate(prompts(3, 30))]
    for _ in range(5):
        step(drafter, seqs, [0, 0, 0])
    assert drafter.draft(seqs, [0, 0, 0]).num_drafts == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_one_salt_taught_is_nothing_to_another(name: str, offers: dict[str, Any]) -> None:
    taught, fresh = make_drafter(name, offers), make_drafter(name, offers)
    texts = prompts(3, 30)
    first = [sequence(i, prompt, "one") for i, prompt in enumerate(texts)]
    run(taught, first, 30)
    for seq in first[:2]:  # one of them is still running
        taught.forget(seq.seq_id)
    for steps in range(8):
        forests = []
        for drafter in (taught, fresh):
            seqs = [sequence(10 + i, prompt, "two") for i, prompt in enumerate(texts)]
            for seq in seqs:
                drafter.forget(seq.seq_id)
            run(drafter, seqs, steps, seed=1)
            forests.append(drafter.draft(seqs, [9, 9, 9]))
        assert forests[0].token.tolist() == forests[1].token.tolist()
        assert forests[0].parent.tolist() == forests[1].parent.tolist()
        if forests[0].confidence is not None and forests[1].confidence is not None:
            assert forests[0].confidence.tolist() == forests[1].confidence.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded_and_sequences_leave_nothing(name: str, offers: dict[str, Any]) -> None:
    """Many sequences of many salts, all forgotten: what is held is within the limit and no longer grows."""
    drafter = make_drafter(name, offers)
    number = 0

    def serve(count: int) -> None:
        nonlocal number
        for prompt in prompts(count, 40, seed=number):
            number += 1
            seq = sequence(number, prompt, f"salt {number % 7}" if number % 2 else "")
            run(drafter, [seq], 6, seed=number)
            drafter.forget(number)

    serve(5)  # tables of the toy, caches of numpy
    tracemalloc.start()
    held = []
    for _ in range(4):
        serve(60)
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[-1] < LIMIT + 60_000, held
    if name in {"none", "ngram", "prediction"}:
        assert held[-1] < 30_000, held


@pytest.mark.parametrize("name", NAMES)
def test_it_bears_not_being_asked_and_not_being_told(name: str, offers: dict[str, Any]) -> None:
    """Steps that others drafted for, steps it saw nothing of, and forgetting whom it does not know."""
    drafter = make_drafter(name, offers)
    seqs = [sequence(i, prompt) for i, prompt in enumerate(prompts(3, 30))]
    drafter.forget(99)
    run(drafter, seqs, 4)
    for seq in seqs:
        seq.commit([7, 8, 9])  # unseen
    run(drafter, seqs, 4)
    foreign = DraftForest.from_parents([([seq.tokens[-1], 11, 12, 13], [-1, 0, 0, 1]) for seq in seqs], ["other"] * 3)
    rows = LOGITS[0, foreign.token]
    drafter.observe(seqs, foreign, Verdict([[1], [], [1, 3]], [[11, 5], [6], [11, 13, 2]]), signals(drafter, rows))
    for seq, tokens in zip(seqs, ([11, 5], [6], [11, 13, 2]), strict=True):
        seq.commit(tokens)
    run(drafter, seqs, 4)
    drafter.forget(seqs[0].seq_id)
    run(drafter, seqs, 4)


@pytest.mark.parametrize("name", ["aded", "stand", "suffix"])
def test_an_answer_asked_for_again_takes_a_fraction_of_the_steps(name: str, offers: dict[str, Any]) -> None:
    drafter = make_drafter(name, offers)
    steps = [ask(drafter, sequence(seq_id, prompts(1, 30, seed=8)[0]), 24) for seq_id in range(2)]
    assert steps[0] >= 20
    assert steps[1] <= steps[0] / 3


def test_recycled_rows_save_steps(offers: dict[str, Any]) -> None:
    """It sees one token of context where the toy looks at two: half of what it saves is luck, but it saves."""
    drafter = make_drafter("token_recycling", offers)
    asked = [sequence(seq_id, prompt) for seq_id, prompt in enumerate(prompts(6, 30))]
    assert sum(ask(drafter, seq, 60) for seq in asked[3:]) < 0.95 * 3 * 60


def ask(drafter: Drafter, seq: Seq, length: int) -> int:
    """Steps until `length` tokens are out."""
    steps = 0
    while seq.num_output < length:
        step(drafter, [seq], [8])
        steps += 1
    drafter.forget(seq.seq_id)
    return steps
