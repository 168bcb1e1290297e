"""Trees grown best first: the likeliest paths, in topological order, within the budget."""

from __future__ import annotations

from itertools import product

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.growth import NO_BRANCHES, Branches, forest_of, grow

Path = tuple[int, ...]


def table(odds: list[float]) -> dict[Path, list[tuple[int, float, Path]]]:
    """A full binary tree of depth 4 with the given conditional probabilities, children by path."""
    found: dict[Path, list[tuple[int, float, Path]]] = {}
    numbers = iter(odds)
    for depth in range(4):
        for path in product((0, 1), repeat=depth):
            found[path] = [(token, next(numbers), (*path, token)) for token in (0, 1)]
    return found


@settings(max_examples=100, deadline=None)
@given(odds=st.lists(st.floats(0, 1), min_size=30, max_size=30), budget=st.integers(0, 35), least=st.floats(0, 0.6))
def test_it_takes_the_likeliest_nodes(odds: list[float], budget: int, least: float) -> None:
    children = table(odds)
    tree = grow((), lambda path: children.get(path, ()), budget, least)
    worth: dict[Path, float] = {(): 1.0}
    for path in sorted(children, key=len):
        for _, p, below in children[path]:
            worth[below] = worth[path] * p
    best = sorted((w for path, w in worth.items() if path and w >= least), reverse=True)[:budget]
    paths: list[Path] = [()]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*paths[parent], token))
    assert sorted((worth[path] for path in paths[1:]), reverse=True) == best
    assert len(set(paths)) == len(paths)
    for path, p in zip(paths[1:], tree.confidence, strict=True):
        assert worth[path[:-1]] * p == worth[path]


def test_a_forest_of_branches_is_well_formed() -> None:
    chain = Branches([5, 6], [0, 1], [0.9, 0.8])
    bush = Branches([7, 8, 9], [0, 0, 2], [0.5, 0.4, 0.3])
    forest = forest_of([1, 2, 3], [chain, NO_BRANCHES, bush], "d")
    assert forest.token.tolist() == [1, 5, 6, 2, 3, 7, 8, 9]
    assert forest.parent.tolist() == [-1, 0, 1, -1, -1, 0, 0, 2]
    assert forest.depth.tolist() == [0, 1, 2, 0, 0, 1, 1, 2]
    assert forest.start.tolist() == [0, 3, 4, 8]
    assert forest.drafter == ["d", "", "d"]
    assert forest.confidence is not None
    assert np.allclose(forest.confidence, [1, 0.9, 0.8, 1, 1, 0.5, 0.4, 0.3])
    assert forest_of([], [], "d").num_trees == 0
