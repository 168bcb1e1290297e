"""Draws from a draft's law: their law is the one they claim, and their noise is nobody else's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations

import torch

from engine.draft_draws import Beam, draft_address, draw_distinct, draw_greedy, draw_iid
from engine.gumbel_max import gumbel_argmax
from engine.noise import TARGET
from engine.sequence import Sequence
from tests.toy import sequence

Q = torch.tensor([0.45, 0.3, 0.05, 0.2])
RUNS = 4000


def seqs(n: int = RUNS) -> list[Sequence]:
    return [sequence(seed=i) for i in range(n)]


def chi_square(
    counts: Counter[tuple[int, ...]], law: Callable[[tuple[int, ...]], float], outcomes: list[tuple[int, ...]]
) -> float:
    assert set(counts) <= set(outcomes)
    runs = sum(counts.values())
    return sum((counts[o] - runs * law(o)) ** 2 / (runs * law(o)) for o in outcomes)


def test_iid_children_are_independent_draws() -> None:
    drawn = draw_iid(Q.expand(RUNS, -1), seqs(), [3] * RUNS, 2)
    outcomes = [(a, b) for a in range(4) for b in range(4)]
    # 99.99% quantile of chi-square with 15 degrees of freedom: 44.3
    assert chi_square(Counter(map(tuple, drawn)), lambda o: float(Q[o[0]] * Q[o[1]]), outcomes) < 44.3


def test_distinct_children_are_drawn_one_after_the_other_without_replacement() -> None:
    drawn = draw_distinct(Q.expand(RUNS, -1), seqs(), [0] * RUNS, 2)
    outcomes = list(permutations(range(4), 2))
    # 11 degrees of freedom: 37.4
    assert chi_square(Counter(map(tuple, drawn)), lambda o: float(Q[o[0]] * Q[o[1]] / (1 - Q[o[0]])), outcomes) < 37.4


def test_no_more_distinct_children_than_possible_tokens() -> None:
    law = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
    one, two = draw_distinct(law, seqs(2), [0, 0], 3)
    assert one == [1] and sorted(two) == [0, 2]


def test_greedy_children_are_the_best_and_one_of_the_rest() -> None:
    drawn, law = draw_greedy(Q.expand(RUNS, -1), seqs(), [0] * RUNS, 3)
    torch.testing.assert_close(law[0], torch.tensor([0.0, 0.0, 0.2, 0.8]))
    assert {tuple(row[:2]) for row in drawn} == {(0, 1)}
    # 1 degree of freedom: 15.1
    assert chi_square(Counter((row[2],) for row in drawn), lambda o: float(law[0, o[0]]), [(2,), (3,)]) < 15.1
    alone, law = draw_greedy(torch.tensor([[0.0, 1.0]]), seqs(1), [0], 2)
    assert alone == [[1]] and not law.any()


def test_a_stochastic_beam_draws_sequences_without_replacement() -> None:
    second = torch.tensor([[0.7, 0.3], [0.4, 0.6]])
    first = torch.tensor([0.8, 0.2])
    counts: Counter[tuple[int, ...]] = Counter()
    for seq in seqs(2000):
        top = Beam.root().extend(first.unsqueeze(0), seq, [0], 2)
        below = top.extend(second[top.token], seq, [1, 2], 2)
        counts[tuple(2 * top.token[p] + t for p, t in zip(below.parent, below.token, strict=True))] += 1
    joint = (first.unsqueeze(1) * second).flatten()
    outcomes = list(permutations(range(4), 2))
    assert chi_square(counts, lambda o: float(joint[o[0]] * joint[o[1]] / (1 - joint[o[0]])), outcomes) < 37.4


def test_draft_noise_is_not_the_targets_and_differs_by_node_and_root() -> None:
    seq = sequence(seed=5)
    rows = torch.zeros(1, 50_000)
    addresses = [draft_address(seq, 0), draft_address(seq, 1), draft_address(seq, 0, 1)]
    seq.commit([1])
    addresses += [draft_address(seq, 0)]
    tokens = gumbel_argmax(rows, [0] * 8, addresses + [type(a)(a.seed, a.sample, a.position, TARGET) for a in addresses])
    assert len(set(tokens)) == 4 + 2
