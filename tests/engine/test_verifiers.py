"""What every verifier does besides having the right law: rows that are unusable, greedy requests, batches, large vocabularies."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from engine.protocols import Siblings, Verifier
from engine.registry import VERIFIERS, make_verifier
from engine.sequence import Sequence as Seq
from engine.tree import DraftForest, Verdict
from tests.drafts import FORK, bias, enumerated, mean_accepted, sampled
from tests.toy import ToyLM, sequence

V = 17
NAMES = list(VERIFIERS)


def verifier(name: str, kind: Siblings = Siblings.IID) -> Verifier:
    return make_verifier(name, {"siblings": {"toy": kind}})


def says(*tokens: int) -> torch.Tensor:
    """Scores whose best token at row i is tokens[i], far above the reach of noise."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).float() * 100


def sure_chain(*tokens: int) -> DraftForest:
    """A chain that was drawn from laws that allowed nothing else."""
    forest = DraftForest.from_chains([9], [tokens], ["toy"])
    forest.law = torch.nn.functional.one_hot(torch.tensor(tokens), V).float()
    forest.law_row = np.array([*range(len(tokens)), -1], dtype=np.int32)
    return forest


def judge(name: str, forest: DraftForest, scores: torch.Tensor, **params: object) -> tuple[list[int], list[int]]:
    found = verifier(name).verify(forest, scores, [sequence([9], **params)])
    return found.nodes[0], found.tokens[0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_chain_that_says_what_the_target_says_stands(name: str, temperature: float) -> None:
    assert judge(name, sure_chain(4, 5), says(4, 5, 6), temperature=temperature) == ([1, 2], [4, 5, 6])
    assert judge(name, sure_chain(4, 5), says(4, 7, 6), temperature=temperature) == ([1], [4, 7])
    assert judge(name, sure_chain(4, 5), says(8, 5, 6), temperature=temperature) == ([], [8])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf, torch.inf])
@pytest.mark.parametrize("name", NAMES)
def test_an_unusable_row_ends_its_tree_where_plain_decoding_would_end(name: str, poison: float, temperature: float) -> None:
    for row, expected in [(0, ([], [])), (1, ([], [4])), (2, ([1], [4, 5]))]:
        scores = says(4, 5, 6)
        scores[row] = poison
        assert judge(name, sure_chain(4, 5), scores, temperature=temperature) == expected
    unreached = says(4, 7, 6)
    unreached[2] = poison
    assert judge(name, sure_chain(4, 5), unreached, temperature=temperature) == ([1], [4, 7])


@pytest.mark.parametrize("name", NAMES)
def test_one_nan_among_many_scores_is_enough(name: str) -> None:
    scores = says(4, 5, 6)
    scores[1, 13] = torch.nan
    assert judge(name, sure_chain(4, 5), scores, temperature=1.0) == ([], [4])


def drawn_forest(seqs: list[Seq], law: torch.Tensor, kind: Siblings, seed: int) -> DraftForest:
    """Two children of each root and one below the first, drawn from law [V]."""
    rng = np.random.default_rng(seed)
    q = law.double().numpy() / law.double().numpy().sum()
    trees = []
    for seq in seqs:
        pair = rng.choice(len(q), 2, replace=kind is Siblings.IID, p=q)
        trees.append(([seq.tokens[-1], *pair.tolist(), int(rng.choice(len(q), p=q))], [-1, 0, 0, 1]))
    forest = DraftForest.from_parents(trees, ["toy"] * len(seqs))
    forest.law = law.unsqueeze(0)
    forest.law_row = np.tile(np.array([0, 0, -1, -1], dtype=np.int32), len(seqs))
    return forest


@pytest.mark.parametrize("name", NAMES)
def test_greedy_requests_get_the_best_tokens_and_share_a_batch(name: str) -> None:
    kind = next(k for k in (Siblings.DISTINCT, Siblings.IID, Siblings.GREEDY) if k in verifier(name).accepts)
    generator = torch.Generator().manual_seed(2)
    law = torch.softmax(torch.randn(V, generator=generator), -1)
    seqs = [sequence([3], b, temperature=float(b % 2), seed=b) for b in range(6)]
    forest = drawn_forest(seqs, law, kind, 7)
    scores = 3 * torch.randn(forest.num_nodes, V, generator=generator)
    together = verifier(name, kind).verify(forest, scores, seqs)
    plain = make_verifier("match").verify(forest, scores, seqs)
    for b, seq in enumerate(seqs):
        if seq.params.greedy:
            assert (together.nodes[b], together.tokens[b]) == (plain.nodes[b], plain.tokens[b])
        alone = verifier(name, kind).verify(forest.select([b]), scores[forest.nodes(b)], [seq])
        assert (together.nodes[b], together.tokens[b]) == (alone.nodes[0], alone.tokens[0])


@pytest.mark.parametrize("name", [n for n in NAMES if verifier(n).lossless and n != "single_coin"])
def test_deterministic_trees_get_the_tokens_of_plain_decoding(name: str) -> None:
    # Where no draft law plays a part, the promise of `match` holds for all.
    scores = torch.randn(4, V, generator=torch.Generator().manual_seed(5))
    forest = DraftForest.from_parents([([9, 4, 5, 4], [-1, 0, 0, 2])], ["toy"])
    for seed in range(20):
        seqs = [sequence([9], temperature=1.0, seed=seed)]
        assert verifier(name, Siblings.POINT).verify(forest, scores, seqs) == make_verifier("match").verify(forest, scores, seqs)


@pytest.mark.parametrize("name", [n for n in NAMES if verifier(n).lossless])
def test_addressed_coins_and_draws_have_the_law_too(name: str) -> None:
    # The exact tests enumerate the coins; these are the real ones. 4,000 seeds, chi-square with 3 degrees of freedom < 21.1.
    kind = next(k for k in (Siblings.IID, Siblings.GREEDY) if k in verifier(name).accepts)
    q, p = np.array([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    law = np.array([0.5, 0.5, 0.0, 0.0]) if kind is Siblings.GREEDY else q
    rng = np.random.default_rng(3)
    n = 4000
    drawn = [
        [3, 2, int(rng.choice(4, p=[0.5, 0.5, 0, 0]))] if kind is Siblings.GREEDY else rng.choice(4, 2, p=q) for _ in range(n)
    ]
    forest = DraftForest.from_parents([([0, *map(int, c)], [-1] + [0] * len(c)) for c in drawn], ["toy"] * n)
    forest.law = torch.from_numpy(law).unsqueeze(0).float()
    forest.law_row = np.where(forest.parent < 0, 0, -1).astype(np.int32)
    seqs = [sequence([0], b, temperature=1.0, seed=b) for b in range(n)]
    found = verifier(name, kind).verify(forest, p.log().expand(forest.num_nodes, -1), seqs)
    counts = np.bincount([tokens[0] for tokens in found.tokens], minlength=4)
    second = np.bincount([tokens[1] for tokens in found.tokens if len(tokens) > 1], minlength=4)
    for seen in (counts, second):
        expected = seen.sum() * p.numpy()
        assert ((seen - expected) ** 2 / expected).sum() < 21.1


@pytest.mark.parametrize("name", [n for n in NAMES if Siblings.IID in verifier(n).accepts])
def test_150k_tokens_take_milliseconds(name: str) -> None:
    size = 150_000
    generator = torch.Generator().manual_seed(1)
    law = torch.softmax(4 * torch.randn(size, generator=generator), -1)
    seqs = [sequence([3], temperature=1.0, seed=8)]
    forest = drawn_forest(seqs, law, Siblings.IID, 1)
    scores = law.log() + 0.3 * torch.randn(4, size, generator=generator)
    judge_ = verifier(name)
    judge_.verify(forest, scores, seqs)
    started = time.perf_counter()
    verdict: Verdict = judge_.verify(forest, scores, seqs)
    assert verdict.tokens[0]
    assert time.perf_counter() - started < 1.0  # 2 to 30 ms on a quiet core; a Python loop over the vocabulary is not


# Lossy verifiers.


def test_lenience_accepts_more_and_is_not_exact_and_is_at_one() -> None:
    p, q = ToyLM(3, 1, sharpness=1.5), ToyLM(3, 101)
    drafted = sampled(q, FORK, Siblings.IID)

    def with_lenience(value: float) -> tuple[float, float]:
        def make(branches: object) -> Verifier:
            made = enumerated("lenient", Siblings.IID, branches)  # type: ignore[arg-type]  # Branches
            made._lenience = value  # type: ignore[attr-defined]  # the plug-in's own
            return made

        return mean_accepted(p, drafted, make), bias(p, drafted, make, 3)

    exact, loose = with_lenience(1.0), with_lenience(0.5)
    assert exact[1] < 1e-9 and loose[1] > 1e-3 and loose[0] > exact[0]
    with pytest.raises(ValueError, match="lenience"):
        make_verifier("lenient", {"siblings": {}}, lenience=0.0)


def test_typical_acceptance_follows_the_likeliest_deep_path_and_rejects_the_unlikely() -> None:
    p = torch.tensor([[0.6, 0.3, 0.06, 0.04]]).log()
    typical = make_verifier("typical")
    seqs = [sequence([0], temperature=1.0, seed=4)]
    # 0.06 lies below min(0.09, 0.3 exp(-H) = 0.117): nodes 1 and 4 fall, 2 and 3 pass; of the paths 2-5 and 3-6, 3 is likelier.
    tree = DraftForest.from_parents([([0, 2, 1, 0, 3, 0, 0], [-1, 0, 0, 0, 0, 2, 3])], ["toy"])
    found = typical.verify(tree, p.expand(7, -1), seqs)
    assert found.nodes[0] == [3, 6] and found.tokens[0][:2] == [0, 0]
    seen = set()
    for seed in range(60):
        seqs = [sequence([0], temperature=1.0, seed=seed)]
        seen.add(typical.verify(DraftForest.roots([0]), p, seqs).tokens[0][0])
    assert seen == {0, 1}  # the token behind the path is drawn from what passes
    with pytest.raises(ValueError, match="epsilon"):
        make_verifier("typical", epsilon=0.0)
