"""Every lossless verifier, on every kind of siblings that it accepts, has the product law: exactly, over every random branch.

And what must not be done fails the same test: pairings that are refused, laws that are not the law of the draw, and
nodes that are dropped for the tokens they carry.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from torch import Tensor

from engine.gumbel_max import Address
from engine.noise import TARGET
from engine.protocols import Siblings, Verifier
from engine.registry import VERIFIERS, make_verifier
from engine.sequence import Sequence as Seq
from engine.tree import DraftForest
from engine.verifiers import traversal
from tests.drafts import (
    BINARY,
    CHAIN_2,
    CHAIN_3,
    FORK,
    WIDE,
    Drafted,
    Pick,
    Shape,
    Tables,
    bias,
    enumerated,
    forest,
    sampled,
    shared_noise,
)
from tests.exact import Branches
from tests.toy import ToyLM

OFFERS = {"siblings": {}}
LOSSLESS = {name: verifier for name in VERIFIERS if (verifier := make_verifier(name, OFFERS)).lossless}
KINDS = (Siblings.POINT, Siblings.IID, Siblings.DISTINCT, Siblings.GREEDY)
PAIRS = [(name, kind) for name, verifier in LOSSLESS.items() for kind in KINDS if kind in verifier.accepts]
EXACT, WRONG = 1e-9, 1e-3
LENGTH = {CHAIN_2: 3, CHAIN_3: 4, FORK: 3, WIDE: 3, BINARY: 3}


def distance(name: str, p: ToyLM, drafted: Drafted, shape: Shape, believed: Siblings) -> float:
    return bias(p, drafted, lambda branches: enumerated(name, believed, branches), LENGTH[tuple(shape)])


@pytest.mark.parametrize(("vocab_size", "shape"), [(3, CHAIN_2), (2, CHAIN_3), (4, FORK), (3, WIDE), (2, BINARY)])
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_law_is_the_targets(name: str, kind: Siblings, vocab_size: int, shape: Shape) -> None:
    for seed in range(2):
        p, q = ToyLM(vocab_size, seed, sharpness=1.5), ToyLM(vocab_size, 100 + seed)
        assert distance(name, p, sampled(q, shape, kind), shape, kind) < EXACT


UNIFORM, PEAKED, SURE, OTHER = [1 / 3] * 3, [0.7, 0.2, 0.1], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]
EDGES = {
    "equal laws": ([PEAKED, UNIFORM], [PEAKED, UNIFORM]),
    "a sure target": ([SURE, OTHER], [PEAKED, UNIFORM]),
    "a sure draft": ([PEAKED, UNIFORM], [SURE, OTHER]),
    "both sure, and wrong": ([SURE, OTHER], [OTHER, SURE]),
    "disjoint supports": ([[0.5, 0.5, 0.0], [0.0, 0.4, 0.6]], [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]),
    "a truncated target": ([[0.6, 0.4, 0.0], PEAKED], [UNIFORM, PEAKED]),
    "a truncated draft": ([PEAKED, UNIFORM], [[0.0, 0.5, 0.5], [0.9, 0.1, 0.0]]),
    "equal below": ([UNIFORM, PEAKED, UNIFORM], [PEAKED, PEAKED, UNIFORM]),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_the_law_is_the_targets_at_the_edges(name: str, kind: Siblings, edge: str) -> None:
    p, q = Tables(EDGES[edge][0]), Tables(EDGES[edge][1])
    for shape in (CHAIN_2, FORK):
        assert distance(name, p, sampled(q, shape, kind), shape, kind) < EXACT


@pytest.mark.parametrize("name", [name for name, verifier in LOSSLESS.items() if Siblings.IID in verifier.accepts])
def test_twins_are_judged_right(name: str) -> None:
    # Two tokens, three independent children: some are the same, and what lies below either of them may be used.
    p, q = ToyLM(2, 5), ToyLM(2, 105)
    assert bias(p, sampled(q, (3, 1, 1, 1), Siblings.IID), lambda b: enumerated(name, Siblings.IID, b), 3) < EXACT


# Trees in which deterministic and sampled nodes meet, as fused drafts are.


def fused(q: ToyLM, guessed: int) -> Drafted:
    """A deterministic child of the root and two independent ones, and under the first drawn one a deterministic one."""

    def draft(seq: Seq, branches: Branches) -> DraftForest:
        law = q.law(seq.tokens)
        drawn = [branches.choose(law.tolist()) for _ in range(2)]
        below = int(q.law([*seq.tokens, drawn[0]]).argmax())
        made = forest([seq.tokens[-1], guessed, *drawn, below], [-1, 0, 0, 0, 2], {0: law})
        made.node_drafter = ["", "guess", "toy", "toy", "guess"]
        return made

    return draft


@pytest.mark.parametrize("name", [name for name, verifier in LOSSLESS.items() if Siblings.IID in verifier.accepts])
@pytest.mark.parametrize("guessed", [0, 2])
def test_deterministic_children_beside_drawn_ones(name: str, guessed: int) -> None:
    p, q = ToyLM(3, 4), ToyLM(3, 104)
    kinds = {"toy": Siblings.IID, "guess": Siblings.POINT}
    assert bias(p, fused(q, guessed), lambda branches: enumerated(name, kinds, branches), 3) < EXACT


# Pairings that are refused.


@pytest.mark.parametrize("vocab_size", [3, 4])
def test_independent_drafts_judgement_is_wrong_for_draws_without_replacement(vocab_size: int) -> None:
    p, q = ToyLM(vocab_size, 1), ToyLM(vocab_size, 101)
    assert Siblings.DISTINCT not in LOSSLESS["spectr"].accepts
    assert distance("spectr", p, sampled(q, FORK, Siblings.DISTINCT), FORK, Siblings.DISTINCT) > WRONG


@pytest.mark.parametrize(
    ("name", "drawn", "believed"),
    [
        (name, drawn, believed)
        for name in ("recursive", "traversal")
        for drawn, believed in [
            (Siblings.IID, Siblings.DISTINCT),
            (Siblings.DISTINCT, Siblings.IID),
        ]
    ]
    + [("spectr", Siblings.DISTINCT, Siblings.IID)],
)
def test_a_drafter_that_misnames_its_siblings_is_caught(name: str, drawn: Siblings, believed: Siblings) -> None:
    distances = []
    for seed in range(3):  # of four tokens, for what the first child leaves must be more than one token
        p, q = ToyLM(4, seed, sharpness=1.5), ToyLM(4, 100 + seed)
        distances.append(distance(name, p, sampled(q, FORK, drawn), FORK, believed))
    assert max(distances) > WRONG


def coupled_beside_drawn(q: ToyLM, picks: dict[int, Pick]) -> Drafted:
    """A child drawn with the target's own noise, and then one drawn independently."""

    def draft(seq: Seq, branches: Branches) -> DraftForest:
        pick = picks[id(branches)] = shared_noise(branches)
        weights = q.law(seq.tokens)
        tokens = [seq.tokens[-1], pick(seq.num_output, weights.tolist()), branches.choose(weights.tolist())]
        made = forest(tokens, [-1, 0, 0], {0: weights})
        made.node_drafter = ["", "coupled", "toy"]
        return made

    return draft


@pytest.mark.parametrize("name", [name for name in LOSSLESS if name != "optimal"])  # it refuses them for being no use
def test_coupled_drafts_are_only_for_verifiers_that_never_look_at_laws(name: str) -> None:
    distances, kinds = [], {"toy": Siblings.IID, "coupled": Siblings.COUPLED}
    for seed in range(4):
        p, q = ToyLM(4, seed, sharpness=1.5), ToyLM(4, 100 + seed)
        picks: dict[int, Pick] = {}

        def judge(branches: Branches, picks: dict[int, Pick] = picks) -> Verifier:
            def draw(scores: Tensor, rows: Sequence[int], addresses: Sequence[Address]) -> list[int]:
                laws = [scores[row].double().softmax(-1).tolist() for row in rows]
                # Noise of another stream is not what the draft was drawn with.
                return [
                    picks[id(branches)](a.position, weights) if a.stream == TARGET else branches.choose(weights)
                    for weights, a in zip(laws, addresses, strict=True)
                ]

            return enumerated(name, kinds, branches, draw)

        distances.append(bias(p, coupled_beside_drawn(q, picks), judge, 2))
    if Siblings.COUPLED in LOSSLESS[name].accepts:
        assert max(distances) < EXACT
    else:
        assert max(distances) > WRONG


# The classic bugs (core.md 0.4 and F).

BY_LAW = [name for name, verifier in LOSSLESS.items() if not verifier.anticipates]


@pytest.mark.parametrize("name", BY_LAW)
def test_the_softmax_of_a_draft_is_not_the_law_of_its_best_tokens(name: str) -> None:
    distances = []
    for seed in range(3):
        p, q = ToyLM(3, seed), ToyLM(3, 100 + seed)
        best = sampled(q, FORK, Siblings.POINT, softmax_law=True)
        distances += [distance(name, p, best, FORK, kind) for kind in (Siblings.IID, Siblings.DISTINCT)]
    assert max(distances) > WRONG


def dropping(drafted: Drafted, q: ToyLM, below: float) -> Drafted:
    """Leaves out what q thinks little of, once it has been drawn, and all that lies below it."""

    def draft(seq: Seq, branches: Branches) -> DraftForest:
        tree = drafted(seq, branches)
        kept = np.ones(tree.num_nodes, dtype=bool)
        for node in range(1, tree.num_nodes):
            parent = int(tree.parent[node])
            likely = q.law(list(seq.tokens) + tree.path(0, parent))[tree.token[node]] >= below
            kept[node] = kept[parent] and likely
        return tree.keep(kept)

    return draft


@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[1] is not Siblings.GREEDY])
def test_nodes_may_be_dropped_for_their_tokens_only_where_the_verifier_says_so(name: str, kind: Siblings) -> None:
    distances = []
    for seed in range(3):
        p, q = ToyLM(3, seed), ToyLM(3, 100 + seed)
        drafts = [(shape, dropping(sampled(q, shape, kind), q, 0.35)) for shape in (CHAIN_2, FORK)]
        distances += [distance(name, p, drafted, shape, kind) for shape, drafted in drafts]
    if LOSSLESS[name].anticipates or kind is Siblings.POINT:
        assert max(distances) < EXACT
    else:
        assert max(distances) > WRONG


def reranked(q: ToyLM, keep: int) -> Drafted:
    """A binary tree drawn without replacement, of which the best paths are kept: EAGLE-2's reranking, on sampled drafts."""
    whole = sampled(q, BINARY, Siblings.DISTINCT)

    def draft(seq: Seq, branches: Branches) -> DraftForest:
        tree = whole(seq, branches)
        score = [1.0]
        for node in range(1, tree.num_nodes):
            parent = int(tree.parent[node])
            score.append(score[parent] * q.law(list(seq.tokens) + tree.path(0, parent))[tree.token[node]])
        kept = np.zeros(tree.num_nodes, dtype=bool)
        kept[sorted(range(tree.num_nodes), key=lambda node: (-score[node], node))[: keep + 1]] = True
        return tree.keep(kept)

    return draft


@pytest.mark.parametrize("name", ["recursive", "traversal", "match"])
def test_reranking_a_sampled_tree_is_for_verifiers_that_allow_it(name: str) -> None:
    distances = [
        distance(name, ToyLM(3, seed), reranked(ToyLM(3, 100 + seed), 3), BINARY, Siblings.DISTINCT) for seed in range(2)
    ]
    assert max(distances) < EXACT if LOSSLESS[name].anticipates else max(distances) > WRONG


def test_the_worth_of_a_node_is_never_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lose = traversal._State.lose

    def forgetful(self: traversal._State, child: traversal._State) -> None:
        worth = self.worth
        lose(self, child)
        self.worth = worth

    monkeypatch.setattr(traversal._State, "lose", forgetful)
    p, q = ToyLM(3, 1, sharpness=1.5), ToyLM(3, 101)
    assert distance("traversal", p, sampled(q, CHAIN_2, Siblings.IID), CHAIN_2, Siblings.IID) > WRONG
