"""Whatever a drafter does, the step gets a well-formed forest within its budgets, and the reason is counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import pytest
import torch

from engine.drafting import Drafting
from engine.protocols import NO_SIGNALS, Drafter, Load, Observed, Policy, Siblings, Signals
from engine.request import Request, SamplingParams, Speculation
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

VOCAB = 100


class Scripted:
    """A drafter that answers with whatever `answer` returns."""

    siblings = Siblings.POINT

    def __init__(self, name: str, answer: Callable[[Seq[Sequence], Seq[int]], DraftForest], needs: Signals = NO_SIGNALS) -> None:
        self.name, self.answer, self.needs = name, answer, needs
        self.asked: list[list[int]] = []
        self.forgotten: list[int] = []

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        self.asked.append([seq.seq_id for seq in seqs])
        return self.answer(seqs, budgets)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        raise RuntimeError("observe went wrong")

    def forget(self, seq_id: int) -> None:
        self.forgotten.append(seq_id)


def sequences(count: int) -> list[Sequence]:
    return [
        Sequence(i, Request(request_id=str(i), prompt_ids=[i, 10 + i], params=SamplingParams(max_tokens=9))) for i in range(count)
    ]


def chains(*guesses: Seq[int]) -> Callable[[Seq[Sequence], Seq[int]], DraftForest]:
    return lambda seqs, budgets: DraftForest.from_chains([seq.tokens[-1] for seq in seqs], guesses[: len(seqs)])


def raises(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
    raise RuntimeError("draft went wrong")


def with_bad_parent(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
    forest = chains([1, 2], [1, 2])(seqs, budgets)
    forest.parent[2] = 2
    return forest


def short_of_a_tree(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
    return DraftForest.roots([seq.tokens[-1] for seq in seqs][:-1])


def truncated(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
    forest = chains([1, 2], [1, 2])(seqs, budgets)
    return DraftForest(forest.token[:-1], forest.parent, forest.depth, forest.start, forest.drafter)


def test_a_sequence_takes_the_first_tree_that_is_more_than_a_root() -> None:
    first, second = Scripted("first", chains([], [1, 2])), Scripted("second", chains([3]))
    forest = Drafting([first, second], VOCAB).draft(sequences(2), [4, 4])
    assert forest.drafter == ["second", "first"]
    assert [forest.token[forest.nodes(b)].tolist() for b in range(2)] == [[10, 3], [11, 1, 2]]
    assert second.asked == [[0]]


def test_a_sequence_without_budget_is_never_drafted_for() -> None:
    drafter = Scripted("d", chains([5]))
    forest = Drafting([drafter], VOCAB).draft(sequences(3), [0, 2, 0])
    assert drafter.asked == [[1]]
    assert [forest.size(b) for b in range(3)] == [1, 2, 1] and forest.drafter == ["", "d", ""]


def test_all_bare_roots_need_no_drafter() -> None:
    drafter = Scripted("d", raises)
    drafting = Drafting([drafter], VOCAB)
    assert drafting.draft(sequences(2), [0, 0]).num_drafts == 0
    assert drafting.draft([], []).num_trees == 0
    assert drafter.asked == [] and drafting.take_fallbacks() == {}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (raises, "raised"),
        (chains([1, VOCAB], [1]), "vocabulary"),
        (chains([1, -1], [1]), "vocabulary"),
        (chains([1, 2, 3, 4, 5], [1]), "malformed"),  # over its budget
        (lambda seqs, budgets: DraftForest.from_chains([0] * len(seqs), [[1]] * len(seqs)), "malformed"),  # wrong roots
        (with_bad_parent, "malformed"),
        (short_of_a_tree, "malformed"),
        (truncated, "malformed"),
        (lambda seqs, budgets: None, "raised"),
    ],
)
def test_a_bad_answer_costs_the_guess_and_is_counted(answer: Callable[..., DraftForest], reason: str) -> None:
    drafting = Drafting([Scripted("bad", answer), Scripted("good", chains([7], [8]))], VOCAB)
    forest = drafting.draft(sequences(2), [4, 4])
    assert forest.drafter == ["good", "good"]
    assert drafting.take_fallbacks() == {reason: 1}
    assert drafting.take_fallbacks() == {}


def test_observe_may_fail_and_forget_reaches_every_drafter() -> None:
    one, two = Scripted("one", raises), Scripted("two", raises)
    drafting = Drafting([one, two], VOCAB)
    drafting.observe([], DraftForest.roots([]), Verdict([], []), Observed())
    drafting.forget(3)
    assert drafting.take_fallbacks() == {"raised": 2}
    assert one.forgotten == two.forgotten == [3]


def test_needs_are_the_union_of_what_the_drafters_need() -> None:
    one = Scripted("one", raises, Signals(top_k=4, hidden_layers=(2,)))
    two = Scripted("two", raises, Signals(top_k=8, hidden_layers=(1, 2), probabilities=True))
    assert Drafting([one, two], VOCAB).needs == Signals(top_k=8, hidden_layers=(1, 2), probabilities=True)


def test_a_branch_is_not_a_chain() -> None:
    branched = DraftForest.from_parents([([1, 2, 3], [-1, 0, 0])])
    assert not branched.is_chains and branched.depth.tolist() == [0, 1, 1]
    assert DraftForest.from_chains([1, 5], [[2, 3], []]).is_chains
    assert branched.path(0, 2) == [3]
    assert np.array_equal(branched.ancestors(0), [[1, 0, 0], [1, 1, 0], [1, 0, 1]])


# several drafters, and a policy that asks for more than one


class AskEveryone(Policy):
    """Asks every drafter for every sequence, and knows how good each is."""

    name = "everyone"

    def __init__(self, **odds: float) -> None:
        self.odds = odds
        self.timed: list[tuple[str, int, int]] = []
        self.gained: list[list[float | None]] = []

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]:
        return [8] * len(seqs)

    def allot(self, drafter: Drafter, seqs: Seq[Sequence], budgets: Seq[int], gained: Seq[float | None], load: Load) -> list[int]:
        self.gained.append(list(gained))
        return list(budgets)

    def estimate(self, drafter: str, seqs: Seq[Sequence], forest: DraftForest) -> np.ndarray:
        return np.where(forest.parent < 0, 1.0, self.odds.get(drafter, 0.5))

    def drafted(self, drafter: str, sequences: int, depth: int, seconds: float) -> None:
        self.timed.append((drafter, sequences, depth))


def sampled(tokens: Seq[int], rows: int) -> Callable[[Seq[Sequence], Seq[int]], DraftForest]:
    def answer(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        forest = DraftForest.from_chains([seq.tokens[-1] for seq in seqs], [tokens] * len(seqs))
        forest.law = torch.arange(rows).repeat(VOCAB, 1).T.float()
        forest.law_row = np.where(forest.depth < len(tokens), forest.depth, -1).astype(np.int32)
        return forest

    return answer


def sampling(name: str, answer: Callable[[Seq[Sequence], Seq[int]], DraftForest]) -> Scripted:
    drafter = Scripted(name, answer)
    drafter.siblings = Siblings.IID
    return drafter


def test_trees_for_the_same_sequence_are_fused_within_its_budget() -> None:
    policy = AskEveryone(one=0.9, two=0.6)
    drafting = Drafting([Scripted("one", chains([1, 2], [])), Scripted("two", chains([1, 3, 4], [5]))], VOCAB)
    forest = drafting.draft(sequences(2), [4, 4], policy)
    assert forest.token[forest.nodes(0)].tolist() == [10, 1, 2, 3, 4] and forest.parent[:5].tolist() == [-1, 0, 1, 1, 3]
    assert forest.drafter == ["one", "two"] and forest.node_drafter == ["", "one", "one", "two", "two", "", "two"]
    assert policy.gained == [[None, None], [pytest.approx(0.9 + 0.81), None]]
    assert policy.timed == [("one", 2, 2), ("two", 2, 3)]
    cut = drafting.draft(sequences(2), [3, 4], policy)
    assert cut.token[cut.nodes(0)].tolist() == [10, 1, 2, 3]
    assert set(drafting.take_seconds()) == {"one", "two"} and drafting.take_seconds() == {}


def test_a_request_names_the_drafters_it_wants() -> None:
    seqs = [
        Sequence(i, Request(request_id=str(i), prompt_ids=[i, 10 + i], params=SamplingParams(max_tokens=9), speculation=wish))
        for i, wish in enumerate([Speculation(drafters=["two"]), Speculation(), Speculation(drafters=[])])
    ]
    one, two = Scripted("one", chains([1])), Scripted("two", chains([2], [3]))
    assert Drafting([one, two], VOCAB).draft(seqs, [4, 4, 4], AskEveryone()).num_drafts == 3
    assert one.asked == [[1]] and two.asked == [[0, 1]]


def test_a_drafter_of_predictions_is_asked_where_there_is_one() -> None:
    drafter = Scripted("p", chains([1]))
    drafter.reports_prediction = True  # type: ignore[attr-defined]  # a capability
    request = Request(request_id="x", prompt_ids=[5], params=SamplingParams(max_tokens=9), prediction_ids=[1])
    Drafting([drafter], VOCAB).draft([*sequences(1), Sequence(7, request)], [4, 4])
    assert drafter.asked == [[7]]


def test_where_laws_count_the_first_drafter_with_a_guess_is_the_only_one() -> None:
    """And every tree finds its own law again, whoever drafted it."""
    lookup = Scripted("lookup", chains([1, 2], [], []))
    first, second = sampling("first", sampled([3, 4], 2)), sampling("second", sampled([5], 3))
    load = Load(0, 0, 16, trims=False)
    drafting = Drafting([lookup, first, second], VOCAB)
    forest = drafting.draft(sequences(3), [4, 4, 4], AskEveryone(), load)
    assert forest.drafter == ["lookup", "first", "first"] and second.asked == []
    assert forest.law is not None and forest.law_row is not None
    assert [forest.is_sampled(b) for b in range(3)] == [False, True, True]
    assert forest.law[forest.law_row[forest.nodes(1)][:2], 0].tolist() == [0.0, 1.0]
    drafting = Drafting([sampling("one", lambda s, b: sampled([3, 4], 2)(s, b).keep(keep_first(s))), second], VOCAB)
    forest = drafting.draft(sequences(2), [4, 4], AskEveryone(), load)
    assert forest.drafter == ["one", "second"]
    assert forest.law is not None and forest.law_row is not None and forest.law.shape[0] == 5
    assert int(forest.law_row[forest.start[1]]) == 2  # behind the two rows of the first drafter


def keep_first(seqs: Seq[Sequence]) -> np.ndarray:
    """Nodes of two drafted ones per sequence: only the first sequence keeps its own."""
    return np.array([True, True, True] + [True, False, False] * (len(seqs) - 1))


def test_where_laws_do_not_count_they_are_dropped() -> None:
    drafting = Drafting([sampling("one", sampled([3, 4], 2)), Scripted("two", chains([5]))], VOCAB)
    forest = drafting.draft(sequences(1), [4], AskEveryone())
    assert forest.law is None and forest.law_row is None and forest.num_drafts == 3
    alone = Drafting([sampling("one", sampled([3, 4], 2))], VOCAB).draft(sequences(1), [4], AskEveryone())
    assert alone.law is None and alone.law_row is None and alone.num_drafts == 2


def with_depth(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
    forest = chains([1, 2], [1, 2])(seqs, budgets)
    forest.depth[2] = 1
    return forest


def with_short_confidence(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
    forest = chains([1, 2], [1, 2])(seqs, budgets)
    forest.confidence = np.ones(3, dtype=np.float32)
    return forest


@pytest.mark.parametrize("answer", [with_depth, with_short_confidence])
def test_a_forest_that_contradicts_itself_is_malformed(answer: Callable[..., DraftForest]) -> None:
    drafting = Drafting([Scripted("bad", answer)], VOCAB)
    assert drafting.draft(sequences(2), [4, 4]).num_drafts == 0
    assert drafting.take_fallbacks() == {"malformed": 1}


# drafters that hang


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def hanging(clock: Clock, seconds: list[float]) -> Callable[[Seq[Sequence], Seq[int]], DraftForest]:
    def answer(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        clock.now += seconds.pop(0) if seconds else 0.0
        return chains([1], [1])(seqs, budgets)

    return answer


def test_a_drafter_that_hangs_costs_one_step() -> None:
    clock = Clock()
    hangs, good = Scripted("hangs", hanging(clock, [5.0])), Scripted("good", chains([7]))
    drafting = Drafting([hangs, good], VOCAB, clock=clock)
    assert drafting.draft(sequences(1), [4]).drafter == ["good"]  # its guess came too late to be of use
    assert drafting.take_fallbacks() == {"slow": 1} and drafting.take_seconds()["hangs"] == 5.0
    for _ in range(20):
        clock.now += 1
        assert drafting.draft(sequences(1), [4]).drafter == ["good"]
    assert len(hangs.asked) == 1 and drafting.take_fallbacks() == {}
    clock.now += 30
    assert drafting.draft(sequences(1), [4]).drafter == ["hangs"]


def test_each_rest_is_twice_as_long_and_good_behaviour_is_remembered() -> None:
    clock = Clock()
    hangs = Scripted("hangs", hanging(clock, [5.0] * 3))
    drafting = Drafting([hangs], VOCAB, clock=clock)
    rests = []
    for _ in range(3):
        asked, started = len(hangs.asked), 0.0
        drafting.draft(sequences(1), [4])
        assert len(hangs.asked) == asked + 1
        started = clock.now
        while len(hangs.asked) == asked + 1 and clock.now < started + 1000:
            clock.now += 0.5
            if not drafting._benches[id(hangs)].sits(clock.now):
                break
        rests.append(clock.now - started)
    assert rests == [30.0, 60.0, 120.0]
    clock.now += 1000
    hangs.answer = hanging(clock, [5.0])
    drafting.draft(sequences(1), [4])
    assert not drafting._benches[id(hangs)].sits(clock.now + 31)


def test_one_that_hangs_while_it_observes_is_left_out_of_that_too() -> None:
    clock = Clock()
    drafter = Scripted("d", chains([1]))
    observed: list[float] = []

    def observe(*_: object) -> None:
        observed.append(clock.now)
        clock.now += 5

    drafter.observe = observe  # type: ignore[method-assign]
    drafting = Drafting([drafter], VOCAB, clock=clock)
    for _ in range(3):
        drafting.observe([], DraftForest.roots([]), Verdict([], []), Observed())
        drafting.draft(sequences(1), [4])
    assert len(observed) == 1 and drafter.asked == []
    assert drafting.take_fallbacks() == {"slow": 1}
    drafting.forget(3)
    assert drafter.forgotten == [3]


def test_a_real_hang() -> None:
    drafter = Scripted("hangs", lambda seqs, budgets: time.sleep(0.06) or chains([1])(seqs, budgets))  # type: ignore[func-returns-value]
    drafting = Drafting([drafter, Scripted("good", chains([7]))], VOCAB, slow_seconds=0.05)
    assert [drafting.draft(sequences(1), [4]).drafter for _ in range(3)] == [["good"]] * 3
    assert len(drafter.asked) == 1 and drafting.take_fallbacks() == {"slow": 1}
