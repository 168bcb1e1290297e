"""Every kind of siblings that the draft model can draw, under the verifiers that judge it: the law shown is that of the draw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import registry
from engine.drafters.draft_model import DraftModelDrafter
from engine.plan import Row
from engine.protocols import Siblings
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.target_law import TargetLaw
from engine.tree import DraftForest
from engine.verification import Verification
from tests.engine.pairs import engine_config, make_engine, make_requests, write_pair
from tests.engine.real import answers
from tests.toy import ToyLM

VOCAB = 4
RULES = ["rejection", "block", "recursive", "traversal", "spectr", "optimal", "single_coin"]
KINDS = {
    "match": Siblings.COUPLED,
    "rejection": Siblings.DISTINCT,
    "recursive": Siblings.DISTINCT,
    "spectr": Siblings.IID,
    "optimal": Siblings.GREEDY,
    "single_coin": Siblings.POINT,
    "typical": Siblings.POINT,
    "lenient": Siblings.IID,
}


class ToyDraft:
    """A toy model behind the interface of a draft model: it reads what it is fed, and needs no cache."""

    vocab_size, max_len, block_size = VOCAB, 1000, 4

    def __init__(self, lm: ToyLM) -> None:
        self.lm = lm

    def forward(self, seqs: Seq[Sequence], rows: Seq[Row], forest: DraftForest, trees: Seq[int]) -> torch.Tensor:
        logits = [
            self.lm.logits(seq.tokens[: row.num_computed + row.num_new] + forest.path(tree, node))
            for seq, row, tree in zip(seqs, rows, trees, strict=True)
            if tree >= 0
            for node in range(forest.size(tree))
        ]
        return torch.from_numpy(np.stack(logits)).float()

    def move(self, source: list[int], target: list[int]) -> None:
        pass

    def clear(self, blocks: list[int]) -> None:
        raise AssertionError("every row is finite")


def make_drafter(verifier: str, seed: int = 2, branches: int = 2) -> DraftModelDrafter:
    config = engine_config(Path("model"), verifier=verifier, lossy=True)
    offers = registry.drafter_offers(config, VOCAB, frozenset(), ToyDraft(ToyLM(VOCAB, seed)))
    drafter = registry.make_drafter("draft_model", offers, branches=branches)
    assert isinstance(drafter, DraftModelDrafter)
    return drafter


def make_sequences(count: int, temperature: float = 1.0) -> list[Sequence]:
    seqs = []
    for i in range(count):
        params = SamplingParams(max_tokens=100, seed=i, temperature=temperature)
        seqs.append(Sequence(i, Request(request_id=str(i), prompt_ids=[0, 1], params=params)))
        seqs[-1].block_ids = list(range(100 * i, 100 * i + 10))
    return seqs


@pytest.mark.parametrize(("verifier", "kind"), KINDS.items())
def test_the_kind_that_serves_the_verifier(verifier: str, kind: Siblings) -> None:
    drafter = make_drafter(verifier)
    assert drafter.siblings is kind
    registry.check_pairing([drafter], registry.make_verifier(verifier, {"siblings": {drafter.name: kind}}))
    assert drafter.branches == (1 if verifier == "rejection" else 2)


@pytest.mark.parametrize("verifier", ["rejection", "recursive", "spectr"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_law_shown_is_the_drafts_at_the_node(verifier: str, temperature: float) -> None:
    drafter = make_drafter(verifier)
    seqs = make_sequences(8, temperature)
    forest = drafter.draft(seqs, [4, 5, 6, 1, 2, 0, 3, 4])
    assert forest.law is not None and forest.law_row is not None
    for b, (seq, budget) in enumerate(zip(seqs, [4, 5, 6, 1, 2, 0, 3, 4], strict=True)):
        first = int(forest.start[b])
        n = drafter.branches
        assert forest.size(b) - 1 == (min(budget, n) if budget < n else budget // n * n)
        parents = {int(parent) for parent in forest.parent[forest.nodes(b)] if parent >= 0}
        for node in range(forest.size(b)):
            row = int(forest.law_row[first + node])
            assert (row >= 0) == (node in parents)
            if row >= 0:
                odds = np.exp(drafter._model.lm.logits(seq.tokens + forest.path(b, node)) / temperature)  # type: ignore[attr-defined]
                np.testing.assert_allclose(forest.law[row], odds / odds.sum(), rtol=1e-5)


@pytest.mark.parametrize("verifier", RULES)
def test_the_first_tokens_follow_the_targets_law(verifier: str) -> None:
    """Many seeds, decoded all at once until each has two tokens out: chi-square over the 16 outcomes."""
    runs = 1500
    target, drafter = ToyLM(VOCAB, 1, dtype=torch.float32), make_drafter(verifier)
    judge = Verification(engine_config(Path("model"), verifier=verifier), [drafter])
    law = TargetLaw(VOCAB, frozenset(), "cpu")
    seqs = make_sequences(runs)
    accepted = 0
    while running := [seq for seq in seqs if seq.num_output < 2]:
        forest = drafter.draft(running, [1 + seq.seq_id % 4 for seq in running])
        verdict = judge.verify(forest, law(target.forward(forest, running), running, forest), running)
        for seq, nodes, tokens in zip(running, verdict.nodes, verdict.tokens, strict=True):
            accepted += len(nodes)
            seq.commit(tokens)
    counts = Counter(tuple(seq.tokens[2:4]) for seq in seqs)
    expected = target.product_law([0, 1], 2)
    chi_square = sum((counts[o] - runs * p) ** 2 / (runs * p) for o, p in expected.items())
    assert chi_square < 44.3  # 15 degrees of freedom: exceeded once in 10,000 times
    assert accepted > runs // 4


def test_greedy_requests_get_the_likeliest_tokens_whatever_the_kind() -> None:
    for verifier in RULES:
        forest = make_drafter(verifier).draft(make_sequences(2, 0.0), [3, 3])
        assert not forest.is_sampled(0) and forest.num_drafts == 6


@pytest.mark.parametrize("verifier", ["rejection", "block", "recursive", "traversal", "optimal"])
def test_a_draft_that_is_the_target_is_never_rejected(verifier: str, tmp_path: Path) -> None:
    """p = q: a rule that knows the law of the draw accepts a child of every node it comes to."""
    pair = write_pair(tmp_path)
    engine = make_engine(pair.target, pair.target, verifier=verifier, budget=6)
    answers(engine, make_requests(4))
    stats = engine.stats()
    assert stats.drafter_fallbacks == {}
    assert stats.num_drafts > 0 and stats.num_accepted_tokens_per_pos[0] == stats.num_drafts
