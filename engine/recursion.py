"""Recursive rejection over the children of a node, in draw order: the walk that several verifiers share (core.md B.1, B.3, B.4).

    r = target law;  for each child: accept with probability min(1, r(x) / d(x)), else r = norm(max(r - d, 0))

with d the law of the child given its siblings before it: q for independent draws (SpecInfer's multi-round rule, arXiv
2305.09781), q without the earlier tokens for draws without replacement (arXiv 2402.14160), one-hot for a deterministic child.
With one child it is speculative sampling (arXiv 2211.17192).
"""

from __future__ import annotations

from engine.child_law import OneHot, residual
from engine.ruling import Coin, RuledTree, Ruling


def recurse(tree: RuledTree, coin: Coin, *, most_sampled: int | None = None, lenience: float = 1.0) -> Ruling:
    """Descend as long as a child is accepted.

    most_sampled: judge only so many sampled children of a node. lenience < 1 judges a child by so much of its law, and
    is not exact.
    """
    group = [0]  # nodes with the same path: the first stands; what was drawn below its twins is as good
    while True:
        accepted, ruling = _children(tree, group, coin, most_sampled, lenience)
        if not accepted:
            return ruling
        group = accepted


def _children(
    tree: RuledTree, group: list[int], coin: Coin, most_sampled: int | None, lenience: float
) -> tuple[list[int], Ruling]:
    """The accepted child and its twins, or none and the ruling."""
    p = tree.p(group[0])
    if p is None:
        return [], Ruling(group[0])
    rest, rejected, sampled = p, False, 0
    for node in group:
        for child, law in tree.laws(node):
            if not isinstance(law, OneHot):
                sampled += 1
                if most_sampled is not None and sampled > most_sampled:
                    continue
            token = tree.token[child]
            if coin(tree.seq, child) * (lenience * law.of(token)) < float(rest[token]):
                return twins(tree, group, child), Ruling(group[0])
            rest, rejected = residual(rest, law, lenience), True
    return [], Ruling(group[0], rest if rejected else None)


def twins(tree: RuledTree, group: list[int], child: int) -> list[int]:
    """`child` first, then the other children of the group that carry its token."""
    others = [c for node in group for c in tree.children[node] if c != child and tree.token[c] == tree.token[child]]
    return [child, *others]
