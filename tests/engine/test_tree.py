"""Cutting a draft forest."""

from __future__ import annotations

import numpy as np
import pytest

from engine import tree
from engine.tree import DraftForest


def _forest() -> DraftForest:
    #   1          8
    #  2 3         |
    #  4 5         9
    forest = DraftForest.from_parents([([1, 2, 3, 4, 5], [-1, 0, 0, 1, 2]), ([8, 9], [-1, 0]), ([7], [-1])], ["a", "b", ""])
    forest.confidence = np.linspace(1, 0, forest.num_nodes, dtype=np.float32)
    forest.node_drafter = ["", *"aaaa", "", "b", ""]
    return forest


@pytest.fixture(params=[tree.FEW, -1], ids=["loop", "arrays"])
def cutting(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to cut a forest: for few nodes, and for many."""
    monkeypatch.setattr(tree, "FEW", request.param)


@pytest.mark.usefixtures("cutting")
def test_a_cut_keeps_paths_and_their_numbers() -> None:
    forest = _forest()
    kept = np.array([1, 0, 1, 0, 1, 1, 0, 1], dtype=bool)
    cut = forest.keep(kept)
    assert cut.token.tolist() == [1, 3, 5, 8, 7]
    assert cut.parent.tolist() == [-1, 0, 1, -1, -1]
    assert cut.depth.tolist() == [0, 1, 2, 0, 0]
    assert cut.start.tolist() == [0, 3, 4, 5]
    assert cut.drafter == ["a", "", ""]
    assert cut.confidence is not None and forest.confidence is not None
    assert cut.confidence.tolist() == forest.confidence[kept].tolist()
    assert cut.node_drafter == ["", "a", "a", "", ""]
    assert cut.path(0, 2) == [3, 5]


@pytest.mark.usefixtures("cutting")
def test_keeping_all_changes_nothing() -> None:
    forest = _forest()
    same = forest.keep(np.ones(forest.num_nodes, dtype=bool))
    for name in ("token", "parent", "depth", "start"):
        assert getattr(same, name).tolist() == getattr(forest, name).tolist()
    assert same.drafter == forest.drafter


@pytest.mark.usefixtures("cutting")
@pytest.mark.parametrize("missing", [0, 1, 5])
def test_no_node_stays_without_its_parent(missing: int) -> None:
    kept = np.ones(8, dtype=bool)
    kept[missing] = False
    with pytest.raises(ValueError, match="cut below"):
        _forest().keep(kept)


def test_some_trees_of_a_forest() -> None:
    forest = DraftForest.from_parents([([9, 4, 5], [-1, 0, 1]), ([2], [-1]), ([7, 8], [-1, 0])], ["a", "b", "c"])
    forest.confidence = np.arange(6, dtype=np.float32)
    forest.law_row = np.array([0, 1, -1, -1, 2, -1], dtype=np.int32)
    part = forest.select([2, 0])
    assert part.start.tolist() == [0, 2, 5] and part.token.tolist() == [7, 8, 9, 4, 5]
    assert part.parent.tolist() == [-1, 0, -1, 0, 1] and part.drafter == ["c", "a"]
    assert part.confidence is not None and part.confidence.tolist() == [4, 5, 0, 1, 2]
    assert part.law_row is not None and part.law_row.tolist() == [2, -1, 0, 1, -1]
    assert [forest.is_sampled(tree) for tree in range(3)] == [True, False, True]
