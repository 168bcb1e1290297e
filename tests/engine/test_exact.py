"""The exact law of the first tokens, over every random branch of draft and verdict."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from torch import Tensor

from engine.gumbel_max import Address
from engine.protocols import Siblings
from engine.sequence import Sequence as Seq
from engine.tree import DraftForest, Verdict
from engine.verifiers.match import MatchVerifier
from tests.exact import Branches, Uniform, law, total_variation
from tests.toy import Guess, ToyLM, Tree, decode, no_guess, sequence

LENGTH = 3


def softmax(row: Tensor) -> list[float]:
    return row.double().softmax(-1).tolist()


def independent_draw(branches: Branches) -> MatchVerifier:
    """`match` with its noise enumerated: Gumbel-max is a categorical choice from the softmax."""

    def draw(scores: Tensor, rows: Sequence[int], addresses: Sequence[Address]) -> list[int]:
        return [branches.choose(softmax(scores[row])) for row in rows]

    return MatchVerifier(draw)


def left(seq: Seq) -> int:
    """How deep a draft is of use."""
    return LENGTH - 1 - seq.num_output


def best(weights: Sequence[float]) -> list[int]:
    return sorted(range(len(weights)), key=lambda token: -weights[token])


def point_tree(lm: ToyLM) -> Guess:
    """The two likeliest tokens, and under each its two likeliest."""

    def guess(seq: Seq) -> Tree:
        tokens, parents = [seq.tokens[-1]], [-1]
        paths: list[list[int]] = [[]]
        for node in range(3):
            if node < len(paths) and len(paths[node]) < left(seq):
                for token in best(lm.law(seq.tokens + paths[node]))[:2]:
                    tokens.append(token)
                    parents.append(node)
                    paths.append([*paths[node], token])
        return tokens, parents

    return guess


def sampled_tree(lm: ToyLM, branches: Branches, distinct: bool, prune: bool = False) -> Guess:
    """Two sampled children, and one under the first; with or without replacement. `prune` drops what it dislikes once seen."""

    def guess(seq: Seq) -> Tree:
        tokens, parents = [seq.tokens[-1]], [-1]
        if left(seq) < 1:
            return tokens, parents
        weights = lm.law(seq.tokens).tolist()
        for _ in range(2):
            token = branches.choose(weights)
            if distinct:
                weights[token] = 0.0
            if not prune or lm.law(seq.tokens)[token] > 0.35:
                tokens.append(token)
                parents.append(0)
        if left(seq) >= 2 and len(tokens) > 1:
            tokens.append(branches.choose(lm.law([*seq.tokens, tokens[1]]).tolist()))
            parents.append(1)
        return tokens, parents

    return guess


@pytest.mark.parametrize("vocab_size", [2, 3, 4])
def test_plain_sampling_has_the_product_law(vocab_size: int) -> None:
    lm = ToyLM(vocab_size, seed=vocab_size)
    found = law(lambda branches: tuple(decode(lm, [sequence()], no_guess, independent_draw(branches), LENGTH)[0]))
    assert total_variation(found, lm.product_law([0], LENGTH)) < 1e-9


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [Siblings.POINT, Siblings.IID, Siblings.DISTINCT])
def test_match_has_the_product_law_whatever_the_draft(kind: Siblings, seed: int) -> None:
    target, draft = ToyLM(3, seed), ToyLM(3, 100 + seed)

    def run(branches: Branches) -> tuple[int, ...]:
        guess = point_tree(draft) if kind is Siblings.POINT else sampled_tree(draft, branches, kind is Siblings.DISTINCT)
        return tuple(decode(target, [sequence()], guess, independent_draw(branches), LENGTH)[0])

    assert kind in MatchVerifier.accepts
    assert total_variation(law(run), target.product_law([0], LENGTH)) < 1e-9


def test_match_has_the_product_law_when_a_controller_drops_drafts_it_has_seen() -> None:
    target, draft = ToyLM(3, 1), ToyLM(3, 101)

    def run(branches: Branches) -> tuple[int, ...]:
        guess = sampled_tree(draft, branches, distinct=False, prune=True)
        return tuple(decode(target, [sequence()], guess, independent_draw(branches), LENGTH)[0])

    assert total_variation(law(run), target.product_law([0], LENGTH)) < 1e-9


@pytest.mark.parametrize("seed", range(5))
def test_match_has_the_product_law_when_drafts_are_drawn_with_its_own_noise(seed: int) -> None:
    # With two tokens only the difference of the two noise values matters, through its distribution function: one uniform
    # number per position, shared by draft and target. Token 1 wins where it lies below the probability of token 1.
    target, draft = ToyLM(2, seed), ToyLM(2, 100 + seed)

    def run(branches: Branches) -> tuple[int, ...]:
        noise: dict[int, Uniform] = {}

        def pick(position: int, weights: Sequence[float]) -> int:
            return int(noise.setdefault(position, branches.uniform()) < weights[1])

        def draw(scores: Tensor, rows: Sequence[int], addresses: Sequence[Address]) -> list[int]:
            return [pick(a.position, softmax(scores[row])) for row, a in zip(rows, addresses, strict=True)]

        def guess(seq: Seq) -> Tree:
            chain: list[int] = []
            while len(chain) < left(seq):
                chain.append(pick(seq.num_output + len(chain), draft.law(seq.tokens + chain).tolist()))
            return [seq.tokens[-1], *chain], list(range(-1, len(chain)))

        return tuple(decode(target, [sequence()], guess, MatchVerifier(draw), LENGTH)[0])

    assert total_variation(law(run), target.product_law([0], LENGTH)) < 1e-9


# Rules that are wrong, or right only where they may be used: the same test must tell.


class FreshPerPath:
    """Draws the target's token anew for every path of the tree and keeps the longest path that agrees."""

    name, accepts, lossless = "fresh-per-path", frozenset(Siblings), False

    def __init__(self, branches: Branches) -> None:
        self._branches = branches

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Sequence[Seq]) -> Verdict:
        parents = forest.parent.tolist()
        longest: tuple[list[int], list[int]] = ([], [])
        for leaf in (n for n in range(forest.num_nodes) if n not in parents[1:]):
            path = [leaf]
            while path[0]:
                path.insert(0, parents[path[0]])
            nodes, tokens = [], []
            for node, child in zip(path, [*path[1:], None], strict=True):
                tokens.append(self._branches.choose(softmax(scores[node])))
                if child is None or int(forest.token[child]) != tokens[-1]:
                    break
                nodes.append(child)
            if len(tokens) > len(longest[1]):
                longest = (nodes, tokens)
        return Verdict([longest[0]], [longest[1]])


class Rejection:
    """Speculative sampling of one draft token (arXiv 2211.17192), exact for a token drawn from q and judged whatever it is."""

    name, accepts, lossless = "rejection", frozenset({Siblings.IID}), True

    def __init__(self, branches: Branches, draft: ToyLM) -> None:
        self._branches, self._draft = branches, draft

    def verify(self, forest: DraftForest, scores: Tensor, seqs: Sequence[Seq]) -> Verdict:
        p = softmax(scores[0])
        if forest.num_nodes == 1:
            return Verdict([[]], [[self._branches.choose(p)]])
        q, token = self._draft.law(seqs[0].tokens).tolist(), int(forest.token[1])
        if self._branches.uniform() * q[token] < p[token]:
            return Verdict([[1]], [[token, self._branches.choose(softmax(scores[1]))]])
        return Verdict([[]], [[self._branches.choose([max(a - b, 0.0) for a, b in zip(p, q, strict=True)])]])


def sampled_token(lm: ToyLM, branches: Branches, drop_below: float) -> Guess:
    def guess(seq: Seq) -> Tree:
        q = lm.law(seq.tokens).tolist()
        token = branches.choose(q)
        return ([seq.tokens[-1]], [-1]) if q[token] < drop_below else ([seq.tokens[-1], token], [-1, 0])

    return guess


def test_a_fresh_sample_per_path_is_caught() -> None:
    target, draft = ToyLM(3, 1), ToyLM(3, 101)

    def run(branches: Branches) -> tuple[int, ...]:
        return tuple(decode(target, [sequence()], point_tree(draft), FreshPerPath(branches), LENGTH)[0])

    assert total_variation(law(run), target.product_law([0], LENGTH)) > 0.02


@pytest.mark.parametrize(("drop_below", "exact"), [(0.0, True), (0.35, False)])
def test_rejection_is_exact_until_drafts_are_dropped_for_what_they_are(drop_below: float, exact: bool) -> None:
    target, draft = ToyLM(3, 1), ToyLM(3, 101)

    def run(branches: Branches) -> tuple[int, ...]:
        guess = sampled_token(draft, branches, drop_below)
        return tuple(decode(target, [sequence()], guess, Rejection(branches, draft), LENGTH)[0])

    distance = total_variation(law(run), target.product_law([0], LENGTH))
    assert distance < 1e-9 if exact else distance > 0.02


def test_the_enumerator_itself() -> None:
    assert law(lambda b: b.choose([1.0, 0.0, 3.0])) == {0: 0.25, 2: 0.75}
    assert law(lambda b: (b.choose([1, 1]), b.choose([1, 3]))) == {(0, 0): 0.125, (0, 1): 0.375, (1, 0): 0.125, (1, 1): 0.375}

    def two_thresholds(branches: Branches) -> tuple[bool, bool, bool]:
        u = branches.uniform()
        return u < 0.25, u < 0.5, u * 2 < 0.25

    found = law(two_thresholds)
    assert found == {
        (True, True, True): 0.125,
        (True, True, False): 0.125,
        (False, True, False): 0.25,
        (False, False, False): 0.5,
    }
