"""Draft trees on toy models, every random choice enumerated, and the exact law of what a verifier makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.gumbel_max import UNUSABLE, Address
from engine.protocols import Siblings, Verifier
from engine.registry import make_verifier
from engine.sequence import Sequence as Seq
from engine.tree import DraftForest
from engine.walk import Draw
from tests.exact import Branches, Uniform, law, total_variation
from tests.toy import ToyLM, sequence

# Children per node in node order: what lies below it, as far as tokens can be found.
Shape = Sequence[int]
CHAIN_2, CHAIN_3, FORK, WIDE, BINARY = (1, 1), (1, 1, 1), (2, 1), (3, 1), (2, 2, 2)
DRAFTER = "toy"
Drafted = Callable[[Seq, Branches], DraftForest]
Pick = Callable[[int, Sequence[float]], int]  # (position, weights) -> token


class Tables(ToyLM):
    """A toy model whose next-token law is one of these rows, by the length of the context; rows may hold zeros."""

    def __init__(self, rows: Sequence[Sequence[float]]) -> None:
        super().__init__(len(rows[0]), 0)
        with np.errstate(divide="ignore"):
            self._log_rows = np.log(np.array(rows, dtype=np.float64))

    def logits(self, context: Sequence[int]) -> np.ndarray:
        return self._log_rows[(len(context) + sum(context)) % len(self._log_rows)]


def sampled(q: ToyLM, shape: Shape, kind: Siblings, *, softmax_law: bool = False) -> Drafted:
    """A tree of this shape with children of this kind. softmax_law: claims q as the law whatever the draw was (a classic bug)."""

    def draft(seq: Seq, branches: Branches) -> DraftForest:
        tokens, parents, paths = [seq.tokens[-1]], [-1], [list(seq.tokens)]
        laws: dict[int, np.ndarray] = {}
        for node, count in enumerate(shape):
            if node >= len(tokens):
                break
            own = q.law(paths[node])
            children, judged = _children(own, count, kind, branches)
            if softmax_law:
                judged = own
            if judged is not None:
                laws[node] = judged
            tokens += children
            parents += [node] * len(children)
            paths += [[*paths[node], child] for child in children]
        return forest(tokens, parents, laws)

    return draft


def forest(tokens: list[int], parents: list[int], laws: Mapping[int, np.ndarray]) -> DraftForest:
    made = DraftForest.from_parents([(tokens, parents)], [DRAFTER])
    if laws:
        order = list(laws)
        made.law = torch.from_numpy(np.stack([laws[node] for node in order]))
        made.law_row = np.array([order.index(node) if node in laws else -1 for node in range(len(tokens))], dtype=np.int32)
    return made


def _children(q: np.ndarray, count: int, kind: Siblings, branches: Branches) -> tuple[list[int], np.ndarray | None]:
    """Children of a node with draft law q, and the law that a verifier is told."""
    best = [int(token) for token in np.argsort(-q, kind="stable")]
    if kind is Siblings.POINT:
        return best[:count], None
    if kind is Siblings.IID:
        return [branches.choose(q.tolist()) for _ in range(count)], q
    if kind is Siblings.DISTINCT:
        left, drawn = q.copy(), []
        while len(drawn) < count and left.sum() > 0:
            drawn.append(branches.choose(left.tolist()))
            left[drawn[-1]] = 0
        return drawn, q
    rest = q.copy()
    rest[best[: count - 1]] = 0
    if rest.sum() == 0:
        return best[: count - 1], None
    rest /= rest.sum()
    return [*best[: count - 1], branches.choose(rest.tolist())], rest


def enumerated(name: str, kind: Siblings | Mapping[str, Siblings], branches: Branches, draw: Draw | None = None) -> Verifier:
    """A verifier with its coins and draws enumerated; it believes that the drafter's siblings are of this kind."""
    offers = {
        "siblings": {DRAFTER: kind} if isinstance(kind, Siblings) else kind,
        "coin": lambda seq, node: branches.uniform(),
        "draw": draw or categorical(branches),
    }
    return make_verifier(name, offers)


def categorical(branches: Branches) -> Draw:
    """Gumbel-max is a categorical choice from the softmax."""

    def draw(scores: Tensor, rows: Sequence[int], addresses: Sequence[Address]) -> list[int]:
        return [branches.choose(odds) if (odds := _odds(scores[row])) else UNUSABLE for row in rows]

    return draw


def _odds(row: Tensor) -> list[float]:
    found = row.double().softmax(-1)
    return [] if bool(found.isnan().any()) else found.tolist()


def shared_noise(branches: Branches) -> Pick:
    """Draws with one uniform number per position, which coupled drafts and the target have in common."""
    noise: dict[int, Uniform] = {}

    def pick(position: int, weights: Sequence[float]) -> int:
        u = noise.setdefault(position, branches.uniform())
        ends = np.cumsum(weights)[:-1].tolist()
        return next((token for token, end in enumerate(ends) if u < end), len(ends))

    return pick


Judge = Callable[[Branches], Verifier]


def bias(p: ToyLM, drafted: Drafted, judge: Judge, length: int) -> float:
    """Total variation between the first `length` tokens and plain sampling's: one step, then plain sampling, exactly."""
    found: dict[tuple[int, ...], float] = {}
    for tokens, probability in step_law(p, drafted, judge).items():
        _extend(p, tokens[:length], probability, length, found)
    return total_variation(found, p.product_law([0], length))


def step_law(p: ToyLM, drafted: Drafted, judge: Judge) -> dict[tuple[int, ...], float]:
    """The law of one verdict's tokens."""

    def run(branches: Branches) -> tuple[int, ...]:
        seq = sequence()
        tree = drafted(seq, branches)
        verdict = judge(branches).verify(tree, p.forward(tree, [seq]), [seq])
        path = [int(tree.token[node]) for node in verdict.nodes[0]]
        assert verdict.tokens[0][:-1] == path, "the accepted nodes carry the tokens"
        assert [int(tree.parent[node]) for node in verdict.nodes[0]] == [0, *verdict.nodes[0]][:-1], "and are a path"
        return tuple(verdict.tokens[0])

    return law(run)


def _extend(p: ToyLM, tokens: tuple[int, ...], probability: float, length: int, found: dict[tuple[int, ...], float]) -> None:
    if len(tokens) == length:
        found[tokens] = found.get(tokens, 0.0) + probability
        return
    for token, chance in enumerate(p.law([0, *tokens])):
        _extend(p, (*tokens, token), probability * chance, length, found)


def mean_accepted(p: ToyLM, drafted: Drafted, judge: Judge) -> float:
    """Expected tokens of one verdict, the bonus not counted."""
    return sum((len(tokens) - 1) * probability for tokens, probability in step_law(p, drafted, judge).items())
