"""The verifying kernels against their twins and against the engine's own verifiers: the same nodes and the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.tree import DraftForest, Verdict
from engine.verifiers.match import MatchVerifier
from engine.verifiers.recursive import RecursiveVerifier
from engine.verifiers.rejection import RejectionVerifier

pytest.importorskip("triton")

from kernels import reference_sampling as reference
from kernels import reject, verify
from tests.kernels.forests import NAMES, Columns, int32, peaked, sampled_forest, sequences, verdict

NUMBERS = {"point": reject.ONE_HOT, "iid": reject.IID, "distinct": reject.DISTINCT, "greedy": reject.GREEDY}


def matched_forest(trees: int, nodes: int, vocab: int, rng: np.random.Generator) -> tuple[DraftForest, np.ndarray]:
    """Trees of up to so many nodes, every third a bare root; children often carry the likeliest token, some of them twice."""
    shapes = []
    for b in range(trees):
        size = 1 if b % 3 == 2 else nodes - b % 2
        shapes.append((np.full(size, -1), np.array([-1, *(rng.integers(max(0, i - 3), i) for i in range(1, size))])))
    scores = peaked(sum(len(t) for t, _ in shapes), vocab, rng)
    first = 0
    for token, parent in shapes:
        token[0] = 0
        for i in range(1, len(token)):
            token[i] = scores[first + parent[i]].argmax() if rng.random() < 0.7 else rng.integers(vocab)
        first += len(token)
    return DraftForest.from_parents([(t.tolist(), p.tolist()) for t, p in shapes], ["point"] * trees), scores


def check_match(scores: Tensor, columns: Columns) -> Verdict:
    found = verify.match_verify(scores, *columns.match())  # type: ignore[arg-type]
    twin = reference.match_verify(scores, *columns.match())  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(found, twin, strict=True))
    answer = verdict(*found)
    assert answer == MatchVerifier().verify(columns.forest, scores.cpu(), columns.seqs)
    return answer


@pytest.mark.parametrize(("trees", "nodes", "vocab"), [(1, 9, 8193), (3, 17, 111), (7, 6, 111)])
def test_the_batched_walk_is_the_match_verifiers(trees: int, nodes: int, vocab: int, device: torch.device) -> None:
    accepted = 0
    for case in range(3):
        rng = np.random.default_rng(100 * nodes + case)
        forest, scores = matched_forest(trees, nodes, vocab, rng)
        columns = Columns(forest, sequences(trees, [b % 4 == 1 for b in range(trees)]), device)
        accepted += sum(map(len, check_match(torch.from_numpy(scores).to(device), columns).nodes))
    assert accepted > trees


@pytest.mark.gpu
@pytest.mark.parametrize(("trees", "nodes", "vocab"), [(1, 512, 128256), (64, 9, 49152), (256, 3, 128256)])
def test_the_batched_walk_at_full_size(trees: int, nodes: int, vocab: int, device: torch.device) -> None:
    forest, scores = matched_forest(trees, nodes, vocab, np.random.default_rng(trees))
    check_match(
        torch.from_numpy(scores).to(device), Columns(forest, sequences(trees, [b % 4 == 1 for b in range(trees)]), device)
    )


def test_bare_roots_are_plain_decoding(device: torch.device) -> None:
    scores = torch.from_numpy(peaked(4, 300, np.random.default_rng(0))).to(device)
    answer = check_match(scores, Columns(DraftForest.roots([0] * 4), sequences(4, [False] * 4), device))
    assert answer.nodes == [[]] * 4 and [len(t) for t in answer.tokens] == [1] * 4


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_path_ends_before_an_unusable_row(dead: int, device: torch.device) -> None:
    scores = torch.full((4, 50), -30.0, device=device)
    scores[:, 5] = 30.0
    scores[dead, 7] = torch.nan
    columns = Columns(DraftForest.from_chains([0], [[5, 5, 5]], ["point"]), sequences(1, [False]), device)
    answer = check_match(scores, columns)
    assert answer.tokens == [[5] * dead] and answer.nodes == [list(range(1, dead))]


def check_recursive(
    kinds: list[str], vocab: int, seed: int, device: torch.device, most: int = 1 << 30, broken: bool = False
) -> Verdict:
    forest, values = sampled_forest(kinds, vocab, np.random.default_rng(seed))
    scores = torch.from_numpy(values).to(device)
    if broken:
        scores[1::2, 3] = torch.nan
    columns = Columns(forest, sequences(len(kinds), [False] * len(kinds)), device)
    assert forest.law is not None
    names = [NUMBERS.get(name, 0) for name in forest.node_drafter or ()]
    ruled = [b for b in range(len(kinds)) if forest.is_sampled(b)][::-1]  # any trees, in any order
    trees = torch.tensor(ruled, device=device)
    law, law_row, kind = (
        forest.law.to(device),
        int32(forest.law_row, device),
        torch.tensor(names, dtype=torch.int8, device=device),
    )
    args = (scores, law, law_row, kind, columns.token, columns.parent, columns.start, trees.int())
    addresses = (columns.seeds[trees], columns.samples[trees], columns.positions[trees])
    sizes = (columns.max_nodes, columns.max_depth)
    found = reject.recursive_verify(*args, *addresses, *sizes, most_sampled=most)
    twin = reference.recursive_verify(*args, *addresses, *sizes, most_sampled=most)
    assert all(torch.equal(a, b) for a, b in zip(found, twin, strict=True))
    verifier = RecursiveVerifier(NAMES) if most > 1 else RejectionVerifier(NAMES)
    expected = verifier.verify(forest, scores.cpu(), columns.seqs)
    answer = verdict(*found)
    assert answer.nodes == [expected.nodes[b] for b in ruled] and answer.tokens == [expected.tokens[b] for b in ruled]
    return answer


@pytest.mark.parametrize("most_sampled", [1, 1 << 30])
@pytest.mark.parametrize(
    "kinds", [["iid"] * 3, ["distinct", "point", "greedy"], ["iid", "distinct", "greedy", "iid", "distinct"]]
)
def test_the_batched_rejection_is_the_verifiers(kinds: list[str], most_sampled: int, device: torch.device) -> None:
    answers = [check_recursive(kinds, 23, seed, device, most_sampled) for seed in range(5)]
    lengths = {len(nodes) for answer in answers for nodes in answer.nodes}
    assert 0 in lengths and len(lengths) > 1  # some rejected, some not


def test_a_larger_vocabulary(device: torch.device) -> None:
    check_recursive(["distinct"], 8193, 5, device)


@pytest.mark.parametrize("seed", range(3))
def test_unusable_rows_end_a_path(seed: int, device: torch.device) -> None:
    check_recursive(["iid", "distinct", "greedy"], 23, seed, device, broken=True)


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [49152, 128256])
def test_the_batched_rejection_at_full_size(vocab: int, device: torch.device) -> None:
    check_recursive(["iid", "distinct", "greedy", "point"] * 8, vocab, 1, device)
