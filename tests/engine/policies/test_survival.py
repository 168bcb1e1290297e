"""Survival estimates find the rates there are, by depth, confidence, drafter and sequence, whatever was not judged."""

from __future__ import annotations

import numpy as np
import pytest

from engine.policies.survival import FEW, Survival, hindsight, path_survival
from engine.tree import DraftForest, Verdict
from tests.engine.policies.world import RIGHT, WRONG, truth


def chains(
    rng: np.random.Generator, odds: list[list[float]], name: str = "d", sure: list[list[float]] | None = None
) -> DraftForest:
    """A chain for each list of odds, whose nodes carry RIGHT with them."""
    drawn = [[RIGHT if rng.random() < p else WRONG for p in row] for row in odds]
    forest = DraftForest.from_chains([0] * len(odds), drawn, [name] * len(odds))
    if sure is not None:
        forest.confidence = np.array([c for row in sure for c in [1.0, *row]], dtype=np.float32)
    return forest


def teach(survival: Survival, ids: list[int], forest: DraftForest) -> None:
    survival.learn(ids, forest, truth(forest))


def test_a_new_sequence_starts_with_what_others_showed() -> None:
    rng, survival = np.random.default_rng(0), Survival()
    rates = [0.8, 0.5, 0.9]
    for step in range(600):
        teach(survival, [step], chains(rng, [rates]))
        survival.forget(step)
    found = survival.estimate("d", [9999], chains(rng, [rates]))
    # The third is of another depth class than the first two; each is met less often than the one before.
    assert found[0] == 1.0
    assert found[1:] == pytest.approx(rates, abs=0.08)
    assert survival.chain("d", [9999], 3)[0] == pytest.approx(np.cumprod(rates), abs=0.08)


def test_positions_behind_the_first_rejection_do_not_count() -> None:
    # Were they counted (as misses, or at all: RIGHT below a WRONG), the second depth would come out at 0.1 or 0.55.
    rng, survival = np.random.default_rng(1), Survival()
    for step in range(800):
        teach(survival, [step], chains(rng, [[0.2, 0.9]]))
    assert survival.estimate("d", [9999], chains(rng, [[0.2, 0.9]]))[1:] == pytest.approx([0.2, 0.9], abs=0.08)


def test_each_sequence_has_a_record_of_its_own_and_loses_it() -> None:
    rng, survival = np.random.default_rng(2), Survival()
    for _ in range(60):
        teach(survival, [1, 2], chains(rng, [[0.95, 0.95], [0.05, 0.05]]))
    forest = chains(rng, [[0.5], [0.5], [0.5]])
    good, bad, new = (survival.estimate("d", [1, 2, 3], forest)[i] for i in (1, 3, 5))
    assert good > 0.85 and bad < 0.2 and bad < new < good
    survival.forget(1)
    assert survival.estimate("d", [1, 2, 3], forest)[1] == pytest.approx(new)


def test_it_learns_in_a_few_steps_and_forgets_when_unused() -> None:
    survival = Survival()
    forest = DraftForest.from_chains([0], [[WRONG]], ["d"])
    before = survival.estimate("d", [1], forest)[1]
    for _ in range(12):
        teach(survival, [1], forest)
    after = survival.estimate("d", [1], forest)[1]
    assert after < before / 4
    for _ in range(400):
        survival.learn([1], DraftForest.roots([0]), Verdict([[]], [[1]]))
    # The offset has faded; what the table has learned has not.
    assert after * 2 < survival.estimate("d", [1], forest)[1]
    assert survival.estimate("d", [1], forest)[1] == pytest.approx(survival.estimate("d", [2], forest)[1], rel=0.2)


@pytest.mark.parametrize("wrong", ["overconfident", "underconfident"])
def test_confidence_is_calibrated(wrong: str) -> None:
    rng, survival = np.random.default_rng(3), Survival()

    def real(confidence: float) -> float:
        return confidence**3 if wrong == "overconfident" else confidence**0.3

    for step in range(700):
        sure = [[float(rng.choice([0.25, 0.65, 0.95])) for _ in range(3)] for _ in range(4)]
        teach(survival, list(range(4 * step, 4 * step + 4)), chains(rng, [[real(c) for c in row] for row in sure], sure=sure))
    sure = [[0.25], [0.65], [0.95]]
    found = survival.estimate("d", [-1, -2, -3], chains(rng, sure, sure=sure))[1::2]
    assert found == pytest.approx([real(0.25), real(0.65), real(0.95)], abs=0.06)
    assert survival.calibration_error < 0.06


def test_raw_confidence_is_what_it_starts_from_and_nonsense_is_survived() -> None:
    forest = DraftForest.from_chains([0], [[1, 2, 3, 4, 5]], ["d"])
    forest.confidence = np.array([1.0, 0.95, 0.01, -7.0, 3.0, np.nan], dtype=np.float32)
    found = Survival().estimate("d", [1], forest)
    assert found[1] == pytest.approx(0.95, abs=0.03) and found[2] < 0.05
    assert ((found[1:] > 0) & (found[1:] < 1)).all()


def test_drafters_do_not_mix() -> None:
    rng, survival = np.random.default_rng(4), Survival(["a", "b"])
    for step in range(300):
        forest = chains(rng, [[0.9], [0.1]])
        forest.drafter = ["a", "b"]
        teach(survival, [2 * step, 2 * step + 1], forest)
    forest = chains(rng, [[0.5]])
    assert survival.estimate("a", [-1], forest)[1] > 0.8 and survival.estimate("b", [-1], forest)[1] < 0.2


def test_a_second_opinion_is_judged_where_the_first_was_wrong() -> None:
    """a is right 70% of the time, and where it is not, b is always: b is not a drafter that is right 30% of the time."""
    rng, survival = np.random.default_rng(5), Survival(["a", "b"])
    for step in range(400):
        right = rng.random() < 0.7
        forest = DraftForest.from_parents([([0, RIGHT if right else WRONG, 5 if right else RIGHT], [-1, 0, 0])], ["a"])
        forest.node_drafter = ["", "a", "b"]
        forest.estimate = np.array([1.0, 0.7, 0.3])
        teach(survival, [step], forest)
    alone = DraftForest.from_chains([0], [[RIGHT]])
    assert survival.estimate("a", [-1], alone)[1] == pytest.approx(0.7, abs=0.08)
    assert survival.estimate("b", [-1], alone)[1] > 0.9


def test_few_and_many_nodes_get_the_same_estimates() -> None:
    rng, survival = np.random.default_rng(6), Survival()
    sure = [[float(c) for c in rng.uniform(0, 1, size=9)] for _ in range(FEW // 8)]
    ids = list(range(len(sure)))
    for _ in range(5):
        teach(survival, ids, chains(rng, [[0.6] * 9 for _ in sure], sure=sure))
    forest = chains(rng, [[0.6] * 9 for _ in sure], sure=sure)
    assert forest.num_nodes > FEW
    found = survival.estimate("d", ids, forest)
    for b in ids:
        one = chains(rng, [[0.6] * 9], sure=[sure[b]])
        assert survival.estimate("d", [b], one) == pytest.approx(found[forest.nodes(b)])


def test_survival_is_the_product_along_the_path_and_falls_on_the_way_down() -> None:
    rng = np.random.default_rng(7)
    for _ in range(50):
        trees = [
            ([0] * size, [-1, *(int(rng.integers(0, i)) for i in range(1, size))])
            for size in rng.integers(1, 70, size=3).tolist()
        ]
        forest = DraftForest.from_parents(trees)
        estimate = np.where(forest.parent < 0, 1.0, rng.uniform(0.01, 0.995, size=forest.num_nodes))
        found = path_survival(forest, estimate)
        for b in range(3):
            first = int(forest.start[b])
            for node in range(forest.size(b)):
                expected, up = 1.0, node
                while up > 0:
                    expected *= estimate[first + up]
                    up = int(forest.parent[first + up])
                assert found[first + node] == pytest.approx(expected, rel=1e-9)
                if node:
                    assert found[first + node] < found[first + forest.parent[first + node]]


def test_an_unusable_verdict_teaches_nothing() -> None:
    survival = Survival()
    forest = DraftForest.from_chains([0], [[WRONG]], ["d"])
    before = survival.estimate("d", [1], forest)[1]
    survival.learn([1], forest, Verdict([[]], [[]]))
    assert survival.estimate("d", [1], forest)[1] == before


def test_memory_follows_the_sequences_that_live() -> None:
    survival, forest = Survival(), DraftForest.from_chains([0], [[WRONG]], ["d"])
    for seq_id in range(5000):
        teach(survival, [seq_id], forest)
        survival.forget(seq_id)
        survival.forget(seq_id)
    assert not survival._own
    for seq_id in range(100):
        teach(survival, [seq_id], forest)
    assert len(survival._own) == 100


def test_a_dropped_node_is_judged_by_the_tokens_that_were_committed() -> None:
    # 0 -> (1: 7 -> 2: 8), (3: 9)
    forest = DraftForest.from_parents([([6], [-1]), ([5, 7, 8, 9], [-1, 0, 1, 0])], ["", "d"])
    assert hindsight(forest, 1, [9]) == [3]
    assert hindsight(forest, 1, [7, 8]) == [1, 2]
    assert hindsight(forest, 1, [7, 3]) == [1]
    assert hindsight(forest, 1, [8]) == hindsight(forest, 1, []) == hindsight(forest, 0, [5]) == []


def test_what_is_never_shown_is_known_all_the_same() -> None:
    rng, survival = np.random.default_rng(3), Survival()
    for step in range(400):
        drafted = chains(rng, [[0.3]])
        shown = drafted.keep(np.array([True, False]))
        survival.learn([step], drafted, truth(shown), cut=True)
        survival.forget(step)
    assert survival.estimate("d", [9999], chains(rng, [[0.3]]))[1] == pytest.approx(0.3, abs=0.06)


def test_nothing_is_concluded_behind_the_last_token() -> None:
    # 7 was committed as the bonus token of a step that showed nothing: nobody knows whether 8 would have followed.
    survival = Survival()
    forest = DraftForest.from_parents([([5, 7, 8], [-1, 0, 1])], ["d"])
    before = survival.estimate("d", [1], forest)
    survival.learn([1], forest, Verdict([[]], [[7]]), cut=True)
    after = survival.estimate("d", [1], forest)
    assert after[1] > before[1] and after[2] >= before[2]
