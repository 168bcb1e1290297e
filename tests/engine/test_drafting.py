"""Whatever a drafter does, the step gets a well-formed forest within its budgets, and the reason is counted."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq

import numpy as np
import pytest

from engine.drafting import Drafting
from engine.protocols import NO_SIGNALS, Observed, Siblings, Signals
from engine.request import Request, SamplingParams
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
