"""The optimal acceptance: equal to brute force over all sets, and never below what a verifier accepts."""

from __future__ import annotations

from itertools import combinations, permutations, product

import numpy as np
import pytest
import torch

from engine.acceptance import best_acceptance
from engine.protocols import Siblings
from engine.registry import make_verifier
from tests.drafts import enumerated, mean_accepted, sampled
from tests.toy import ToyLM

SAMPLED = (Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY)
BY_LAW = ("rejection", "recursive", "block", "spectr", "optimal", "traversal", "single_coin", "match")


def children_law(q: np.ndarray, n: int, kind: Siblings) -> dict[tuple[int, ...], float]:
    """Every possible tuple of children and its probability."""
    tokens = range(len(q))
    if kind is Siblings.IID:
        return {c: float(np.prod(q[list(c)])) for c in product(tokens, repeat=n)}
    if kind is Siblings.DISTINCT:
        found = {}
        for c in permutations(tokens, n):
            left, probability = 1.0, 1.0
            for token in c:
                probability *= q[token] / left
                left -= q[token]
            found[c] = float(probability)
        return found
    top = tuple(np.argsort(-q, kind="stable")[: n - 1].tolist())
    rest = 1 - q[list(top)].sum()
    return {(*top, t): float(q[t] / rest) for t in tokens if t not in top}


def by_all_sets(p: np.ndarray, q: np.ndarray, n: int, kind: Siblings) -> float:
    """1 + min over H of [P(H) - Pr(all children in H)]: the dual of the transport problem, over every set of tokens."""
    drawn = children_law(q, n, kind)
    sets = (set(h) for size in range(len(p) + 1) for h in combinations(range(len(p)), size))
    return 1 + min(sum(p[t] for t in h) - sum(w for c, w in drawn.items() if set(c) <= h) for h in sets)


@pytest.mark.parametrize("kind", SAMPLED)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_prefix_of_the_tokens_by_p_over_q_is_the_best_set(kind: Siblings, n: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        p, q = rng.dirichlet(np.full(5, 0.5)), rng.dirichlet(np.full(5, 0.7))
        found = best_acceptance(torch.from_numpy(p), torch.from_numpy(q), n, kind)
        assert found == pytest.approx(by_all_sets(p, q, n, kind), abs=1e-6)


def test_the_transport_problem_itself_has_that_value() -> None:
    # The primal: greedy augmentation on the bipartite graph (children drawn -> a child that carries the token), by max-flow.
    p, q = np.array([0.5, 0.2, 0.2, 0.1]), np.array([0.1, 0.3, 0.4, 0.2])
    for kind in SAMPLED:
        drawn = children_law(q, 2, kind)
        assert max_flow(drawn, p) == pytest.approx(best_acceptance(torch.from_numpy(p), torch.from_numpy(q), 2, kind), abs=1e-6)


def max_flow(drawn: dict[tuple[int, ...], float], p: np.ndarray) -> float:
    """How much of the children's mass can be sent to tokens that they carry, token t taking at most p[t]. (Edmonds-Karp.)"""
    nodes = [*drawn, *range(len(p))]
    capacity: dict[tuple[object, object], float] = {}
    for c, weight in drawn.items():
        capacity["source", c] = weight
        for token in set(c):
            capacity[c, token] = 1.0
    for token, weight in enumerate(p):
        capacity[token, "sink"] = float(weight)
    flow = 0.0
    while True:
        before: dict[object, object] = {"source": None}
        queue: list[object] = ["source"]
        while queue and "sink" not in before:
            here = queue.pop(0)
            for there in [*nodes, "sink"]:
                if there not in before and capacity.get((here, there), 0.0) > 1e-12:
                    before[there] = here
                    queue.append(there)
        if "sink" not in before:
            return flow
        path, here = [], "sink"
        while before[here] is not None:
            path.append((before[here], here))
            here = before[here]  # type: ignore[assignment]
        pushed = min(capacity[edge] for edge in path)
        for a, b in path:
            capacity[a, b] -= pushed
            capacity[b, a] = capacity.get((b, a), 0.0) + pushed
        flow += pushed


@pytest.mark.parametrize("kind", [Siblings.POINT, *SAMPLED])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_no_verifier_accepts_more(kind: Siblings, n: int) -> None:
    for seed in range(3):
        p, q = ToyLM(4, seed, sharpness=1.5), ToyLM(4, 100 + seed)
        laws = [torch.from_numpy(lm.law([0])) for lm in (p, q)]
        bound = best_acceptance(*laws, n, kind)
        found = {
            name: mean_accepted(p, sampled(q, (n,), kind), lambda b, name=name: enumerated(name, kind, b))
            for name in BY_LAW
            if kind in make_verifier(name, {"siblings": {}}).accepts
        }
        assert max(found.values()) <= bound + 1e-6
        if kind is Siblings.GREEDY:
            assert found["optimal"] == pytest.approx(bound, abs=1e-6)
        if kind is Siblings.POINT:
            assert set(np.round(list(found.values()), 9)) == {round(bound, 9)}
        if n == 1 and kind is not Siblings.POINT:  # one draft: min(p, q) is the best there is
            assert found["recursive"] == pytest.approx(bound, abs=1e-6)
        if kind is Siblings.IID and n > 1:
            assert found["spectr"] >= (1 - 1 / np.e) * bound
            assert found["single_coin"] <= max(found["spectr"], found["recursive"])


def accepted(name: str, seed: int, shape: tuple[int, ...], kind: Siblings) -> float:
    p, q = ToyLM(3, seed, sharpness=1.5), ToyLM(3, 100 + seed)
    return mean_accepted(p, sampled(q, shape, kind), lambda b: enumerated(name, kind, b))


@pytest.mark.parametrize("seed", range(3))
def test_block_and_traversal_accept_no_less_than_their_token_by_token_rules(seed: int) -> None:
    chain = [accepted(name, seed, (1, 1), Siblings.IID) for name in ("rejection", "block", "traversal")]
    assert chain[1] > chain[0] - 1e-9 and chain[2] == pytest.approx(chain[1])
    tree = [accepted(name, seed, (2, 1, 1), Siblings.DISTINCT) for name in ("recursive", "traversal")]
    assert tree[1] > tree[0] - 1e-9


def test_the_bound_at_its_ends() -> None:
    q = torch.tensor([0.5, 0.5, 0.0, 0.0])
    p = torch.tensor([0.0, 0.0, 0.5, 0.5])
    for kind in SAMPLED:
        assert best_acceptance(q, q, 1, kind) == pytest.approx(1.0)
        assert best_acceptance(p, q, 2, kind) == pytest.approx(0.0)
    assert best_acceptance(torch.tensor([0.25] * 4), q, 3, Siblings.DISTINCT) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least one child"):
        best_acceptance(p, q, 0, Siblings.IID)


def test_a_large_vocabulary_with_a_peak() -> None:
    # More children never accept less, and draws without replacement more than with.
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.softmax(4 * torch.randn(2000, generator=generator), -1) for _ in range(2))
    p = 0.5 * (p + q)
    last = 0.0
    for n in (1, 2, 3, 4):
        iid, distinct = (best_acceptance(p, q, n, kind) for kind in (Siblings.IID, Siblings.DISTINCT))
        assert last <= iid + 1e-7 and iid <= distinct + 1e-6
        last = iid
