"""Verifiers that judge by a draft law, in a real engine: the sampled law is the model's, greedy answers are plain decoding's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from itertools import product
from math import exp
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.draft_draws import draw_distinct, draw_greedy, draw_iid
from engine.protocols import Siblings
from engine.registry import VERIFIERS, load
from engine.request import Request
from engine.sequence import Sequence
from engine.tree import DraftForest
from engine.worker import Worker
from tests.engine.real import GarbageDrafter, answers, load_worker, make_engine, request

ALLOWED = [20, 33, 47]
PROMPT = [5, 90, 31, 77, 12, 64]
BY_LAW = [name for name in VERIFIERS if load("verifier", name).lossless and not load("verifier", name).anticipates]
SAMPLES, TEMPERATURE = 600, 4.0


@pytest.fixture(scope="module")
def worker(tiny_llama_dir: Path) -> Worker:
    return load_worker(tiny_llama_dir)


class LawDrafter(GarbageDrafter):
    """Draws two children of the root, and one below the first, from a law that knows the sequence's last token alone."""

    name = "law"

    def __init__(self, vocab_size: int, kind: Siblings) -> None:
        super().__init__(vocab_size)
        self.siblings = kind

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        trees: list[tuple[list[int], list[int]]] = []
        laws: list[torch.Tensor] = []
        rows: list[int] = []
        for seq, budget in zip(seqs, budgets, strict=True):
            tokens, parents, own = [seq.tokens[-1]], [-1], {}
            for node, count in ((0, 2), (1, 1)) if budget >= 3 else ():
                children, law = self._children(seq, node, tokens[node], count)
                own[node] = len(laws)
                laws.append(law[0])
                tokens += children
                parents += [node] * len(children)
            rows += [own.get(node, -1) for node in range(len(tokens))]
            trees.append((tokens, parents))
        forest = DraftForest.from_parents(trees, [self.name] * len(trees))
        if laws:
            forest.law, forest.law_row = torch.stack(laws), np.array(rows, dtype=np.int32)
        return forest

    def _children(self, seq: Sequence, node: int, last: int, count: int) -> tuple[list[int], torch.Tensor]:
        law = torch.zeros(1, self.vocab_size)
        law[0, ALLOWED] = torch.softmax(torch.tensor([0.3 * (last % 7), 1.0, -0.5]), 0)
        if self.siblings is Siblings.GREEDY:
            children, law = draw_greedy(law, [seq], [node], count)
            return children[0], law
        draw = draw_iid if self.siblings is Siblings.IID else draw_distinct
        return draw(law, [seq], [node], count)[0], law


def kind_for(name: str) -> Siblings:
    accepts = load("verifier", name).accepts
    return next(kind for kind in (Siblings.DISTINCT, Siblings.IID, Siblings.GREEDY) if kind in accepts)


@pytest.fixture(scope="module")
def law(worker: Worker) -> dict[tuple[int, ...], float]:
    """The law of the first three tokens, from the model's own log-probabilities."""
    prefixes = [prefix for length in range(3) for prefix in product(ALLOWED, repeat=length)]
    vocab = worker.info.vocab_size
    asked = [request(str(p), [*PROMPT, *p], max_tokens=1, temperature=0.0, logprobs=vocab) for p in prefixes]
    found = answers(make_engine(worker), asked)
    rows = {}
    for prefix in prefixes:
        logprobs = dict(found[str(prefix), 0].logprobs[0].top)
        total = sum(exp(logprobs[token] / TEMPERATURE) for token in ALLOWED)
        rows[prefix] = {token: exp(logprobs[token] / TEMPERATURE) / total for token in ALLOWED}
    return {(a, b, c): rows[()][a] * rows[a,][b] * rows[a, b][c] for a, b, c in product(ALLOWED, repeat=3)}


@pytest.mark.parametrize("name", BY_LAW)
def test_the_sampled_law_is_the_models(name: str, worker: Worker, law: dict[tuple[int, ...], float]) -> None:
    engine = make_engine(worker, [LawDrafter(worker.info.vocab_size, kind_for(name))], verifier=name)
    params = {"max_tokens": 5, "temperature": TEMPERATURE, "allowed_token_ids": ALLOWED, "ignore_eos": True}
    asked = [request(f"r{seed}", PROMPT, seed=seed, **params) for seed in range(SAMPLES)]
    counts = Counter(tuple(answer.tokens[:3]) for answer in answers(engine, asked).values())
    stats = engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens and not stats.drafter_fallbacks
    assert min(law.values()) * SAMPLES > 5 and set(counts) <= set(law)
    # 26 degrees of freedom: 99.99% quantile 62.0
    assert sum((counts[tokens] - SAMPLES * p) ** 2 / (SAMPLES * p) for tokens, p in law.items()) < 62.0


@pytest.mark.parametrize("name", VERIFIERS)
def test_greedy_answers_are_plain_decodings(name: str, worker: Worker) -> None:
    asked = [
        request(f"r{i}", PROMPT[i:], max_tokens=12, temperature=0.0, allowed_token_ids=ALLOWED, ignore_eos=True) for i in range(3)
    ]
    plain = answers(make_engine(worker), asked)
    drafter = LawDrafter(worker.info.vocab_size, kind_for(name))
    engine = make_engine(worker, [drafter, "ngram"], verifier=name, lossy=True)
    found = answers(engine, asked)
    assert {key: answer.tokens for key, answer in found.items()} == {key: answer.tokens for key, answer in plain.items()}
    assert engine.stats().num_draft_tokens > 0


@pytest.mark.parametrize("name", ["rejection", "recursive", "traversal"])
def test_the_same_schedule_gives_the_same_tokens_again_and_without_drafts_those_of_plain_decoding(
    name: str, worker: Worker
) -> None:
    asked = [
        request(f"r{i}", PROMPT, max_tokens=16, temperature=1.0, seed=i, allowed_token_ids=ALLOWED, ignore_eos=True)
        for i in range(6)
    ]

    def run(requests: list[Request], budget: int, verifier: str = name) -> list[list[int]]:
        engine = make_engine(worker, [LawDrafter(worker.info.vocab_size, Siblings.DISTINCT)], budget=budget, verifier=verifier)
        return [answer.tokens for _, answer in sorted(answers(engine, requests).items())]

    together = run(asked, 3)
    assert together == run(asked, 3)
    assert together == [run([one], 3)[0] for one in asked], "alone, the schedule of drafts is the same"
    plain = run(asked, 1, "match")
    assert run(asked, 1) == plain and together != plain
