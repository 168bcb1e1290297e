"""Trees of several drafters become one: prefixes are shared, the better estimate stands, second opinions get what is left."""

from __future__ import annotations

import random

import numpy as np
import pytest

from engine.fusion import Tree, forest_of, fuse


def chain(name: str, tokens: list[int], estimate: list[float] | float = 0.5) -> Tree:
    sure = [estimate] * len(tokens) if isinstance(estimate, float) else estimate
    length = len(tokens)
    return Tree([0, *tokens], list(range(-1, length)), [1.0, *sure], [1.0, *sure], ["", *[name] * length])


def paths(tree: Tree) -> set[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.token[1:], tree.parent[1:], strict=True):
        found.append((*found[parent], token))
    return set(found)


def test_shared_prefixes_are_one_path() -> None:
    fused = fuse([chain("a", [1, 2, 3]), chain("b", [1, 2, 4, 5])])
    assert fused.token == [0, 1, 2, 3, 4, 5] and fused.parent == [-1, 0, 1, 2, 2, 4]
    assert fused.drafter == ["", "a", "a", "a", "b", "b"]


def test_a_node_goes_to_whoever_expects_most_of_it() -> None:
    fused = fuse([chain("a", [1, 2], [0.5, 0.9]), chain("b", [1, 2], [0.8, 0.3])])
    assert fused.drafter == ["", "b", "a"] and fused.estimate == [1.0, 0.8, 0.9] and fused.confidence == [1.0, 0.8, 0.9]


def test_a_second_opinion_gets_what_the_first_leaves() -> None:
    fused = fuse([chain("a", [1], 0.6), chain("b", [2], 0.5)])
    assert fused.estimate == pytest.approx([1.0, 0.6, 0.2])
    fused = fuse([chain("a", [1], 0.3), chain("b", [2], 0.9), chain("c", [3], 0.5)])
    assert fused.estimate == pytest.approx([1.0, 0.3 * 0.05, 0.9, 0.5 * 0.1])
    # One drafter's own siblings share already.
    both = Tree([0, 1, 2], [-1, 0, 0], [1.0, 0.5, 0.3], [1.0, 0.5, 0.3], ["", "a", "a"])
    assert fuse([both, chain("b", [1], 0.1)]).estimate == [1.0, 0.5, 0.3]


def test_fused_trees_hold_every_path_once() -> None:
    rng = random.Random(0)
    for _ in range(200):
        trees = []
        for name in "abc"[: rng.randint(1, 3)]:
            size = rng.randint(0, 8)
            trees.append(
                Tree(
                    [0, *(rng.randrange(3) for _ in range(size))],
                    [-1, *(rng.randrange(i + 1) for i in range(size))],
                    [1.0, *(rng.random() for _ in range(size))],
                    [1.0, *(rng.random() for _ in range(size))],
                    ["", *[name] * size],
                )
            )
        fused = fuse(trees)
        assert paths(fused) == set().union(*map(paths, trees))
        assert all(parent < node for node, parent in enumerate(fused.parent))
        assert all(0 <= estimate <= 1 for estimate in fused.estimate)
        budget = rng.randint(0, 6)
        cut = fused.cut(budget)
        assert len(cut.token) - 1 == min(budget, len(fused.token) - 1)
        assert paths(cut) <= paths(fused) and all(parent < node for node, parent in enumerate(cut.parent))
        survival = sorted(fused.survival()[1:], reverse=True)
        assert cut.gain() == pytest.approx(sum(survival[: len(cut.token) - 1]))


def test_a_forest_of_trees_knows_depths_owners_and_laws() -> None:
    second = chain("b", [5, 6])
    second.law_row = [2, 3, -1]
    forest = forest_of([fuse([chain("a", [1, 2, 3]), chain("b", [1, 4])]), Tree([9], [-1], [1.0], [1.0], [""]), second])
    assert forest.start.tolist() == [0, 5, 6, 9] and forest.depth.tolist() == [0, 1, 2, 3, 2, 0, 0, 1, 2]
    assert forest.drafter == ["a", "", "b"] and forest.node_drafter == ["", "a", "a", "a", "b", "", "", "b", "b"]
    assert forest.law_row is not None and forest.law_row.tolist() == [-1] * 6 + [2, 3, -1]
    assert forest.estimate is not None and forest.confidence is not None and not np.isnan(forest.confidence).any()
    assert forest_of([chain("a", [1])]).law_row is None
