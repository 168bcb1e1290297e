"""Drafter lookahead: the layout of the window, its growth by what the target says, the pool, the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch

from engine.drafters.lookahead import POOL_TOKENS, WINDOW_CONFIDENCE, LookaheadDrafter
from engine.protocols import Observed
from engine.request import Request, SamplingParams
from engine.sequence import Sequence as Seq
from engine.tree import DraftForest, Verdict

EOS = 3


def sequence(tokens: Sequence[int], seq_id: int = 0) -> Seq:
    return Seq(seq_id, Request(request_id="r", prompt_ids=list(tokens), params=SamplingParams(max_tokens=10_000)))


def paths(forest: DraftForest, tree: int = 0) -> list[tuple[int, ...]]:
    return [tuple(forest.path(tree, node)) for node in range(1, forest.size(tree))]


def step(drafter: LookaheadDrafter, seq: Seq, budget: int, says: Callable[[list[int]], int]) -> tuple[DraftForest, int]:
    """One step of a model whose best token behind a text is says(text); returns the forest and how many drafts stood."""
    forest = drafter.draft([seq], [budget])
    assert forest.num_drafts <= budget
    best = [says([*seq.tokens, *forest.path(0, node)]) for node in range(forest.num_nodes)]
    node, nodes, tokens = 0, [], [best[0]]
    while True:
        below = [n for n in range(1, forest.num_nodes) if forest.parent[n] == node and forest.token[n] == tokens[-1]]
        if not below:
            break
        assert len(below) == 1, "siblings carry different tokens"
        node = below[0]
        nodes.append(node)
        tokens.append(best[node])
    top_ids = torch.tensor(best)[:, None].repeat(1, 4)
    drafter.observe([seq], forest, Verdict([nodes], [tokens]), Observed(top_ids=top_ids))
    seq.commit(tokens)
    return forest, len(nodes)


def test_the_window_is_laid_out_as_in_the_paper() -> None:
    """Columns of three tokens: 10 11 12 below the root, 14 15 16 below it, 18 19 20 below 14; the first token is the root."""
    drafter, seq = LookaheadDrafter(window=3, ngram=4), sequence(range(10, 22))
    forest = drafter.draft([seq], [20])
    assert set(paths(forest)) == {(11,), (11, 12), (14,), (14, 15), (14, 15, 16), (14, 18), (14, 18, 19), (14, 18, 19, 20)}
    assert forest.confidence is not None
    assert forest.confidence[1:].tolist() == pytest.approx([WINDOW_CONFIDENCE] * 8)


def test_a_column_gives_an_ngram_and_moves_on() -> None:
    drafter, seq = LookaheadDrafter(window=2, ngram=3), sequence(range(10, 20))

    def says(text: list[int]) -> int:
        return 1000 * text[-2] + text[-1]

    step(drafter, seq, 20, says)  # columns: root 11 | 15 16
    pool = drafter._states[0].pool
    assert list(pool[19]) == [(11, 19_011)]
    assert list(pool[15]) == [(16, 17), (16, 15_016)]
    second = drafter.draft([seq], [20])  # columns: root' 19011 | 16 15016
    assert set(paths(second)) == {(19_011,), (16,), (16, 15_016)}


def test_several_committed_tokens_move_the_columns_as_far() -> None:
    drafter, seq = LookaheadDrafter(window=4, ngram=3), sequence(range(10, 50))
    forest = drafter.draft([seq], [20])
    top_ids = torch.arange(100, 100 + forest.num_nodes)[:, None]
    columns = drafter._states[0]._columns
    drafter.observe([seq], forest, Verdict([[]], [[1, 2, 3]]), Observed(top_ids=top_ids))
    assert drafter._states[0]._columns == columns[2:] + columns[:2]


def test_the_pool_guesses_what_the_text_said_before() -> None:
    seq = sequence([1, 2, 3, 4, 50, 51, 52, 53, 1])
    found = paths(LookaheadDrafter(ngram=4, share=0).draft([seq], [8]))
    assert found == [(2,), (2, 3), (2, 3, 4)]
    assert LookaheadDrafter(ngram=4, share=0).draft([sequence([1, 2, 3, 4, 5])], [8]).num_drafts == 0


def test_the_latest_ngrams_count_most_and_the_oldest_leave() -> None:
    text = [token for follower in range(60, 70) for token in (1, follower, 2)]
    forest = LookaheadDrafter(ngram=2, guesses=3, share=0).draft([sequence([*text, 1])], [8])
    assert paths(forest) == [(69,), (68,), (67,)]
    assert forest.confidence is not None
    assert forest.confidence[1] > forest.confidence[2] > forest.confidence[3]


def test_a_trajectory_is_accepted() -> None:
    """A model whose text never repeats itself: only a trajectory that ran ahead of the text can have guessed it."""

    def says(text: list[int]) -> int:
        return (text[-1] * 5 + 3) % 97

    ahead = [5]
    while len(ahead) < 12:
        ahead.append(says(ahead))
    seq = sequence([1, 2, *ahead[-2:], 4, 6, 5])  # one column begins ten tokens ahead of the text
    drafter, stood, steps = LookaheadDrafter(window=5, ngram=4), 0, 0
    while seq.num_output < 60:
        stood += step(drafter, seq, 40, says)[1]
        steps += 1
    text = seq.tokens[seq.num_prompt - 1 :]
    assert all(after == says([before]) for before, after in pairwise(text))
    assert len(set(text)) == len(text)
    assert stood >= 10 and steps <= 50


@pytest.mark.parametrize("budget", [0, 1, 2, 3, 5, 8, 100])
def test_guesses_and_window_keep_to_the_budget(budget: int) -> None:
    drafter = LookaheadDrafter()
    seqs = [sequence([i % 7 for i in range(30 + j)], j) for j in range(3)]
    for _ in range(20):
        forest = drafter.draft(seqs, [budget] * 3)
        assert [forest.size(b) - 1 <= budget for b in range(3)] == [True] * 3
        top_ids = torch.arange(forest.num_nodes)[:, None] % 11
        drafter.observe(seqs, forest, Verdict([[]] * 3, [[1]] * 3), Observed(top_ids=top_ids))
        for seq in seqs:
            seq.commit([seq.num_tokens % 5])
    if not budget:
        assert not drafter._states


def test_the_end_never_enters_the_window() -> None:
    drafter, seq = LookaheadDrafter(frozenset({EOS}), window=3, ngram=4), sequence([10, 11, 12, 13])
    for _ in range(8):
        forest, _ = step(drafter, seq, 20, lambda text: 40)
        assert EOS not in forest.token[1:]
        forest = drafter.draft([seq], [20])
        top_ids = torch.full((forest.num_nodes, 1), EOS)
        drafter.observe([seq], forest, Verdict([[]], [[1]]), Observed(top_ids=top_ids))
        assert not any(EOS in column for column in drafter._states[0]._columns)


def test_what_was_trimmed_or_drafted_by_others_teaches_nothing() -> None:
    drafter, seq = LookaheadDrafter(window=3, ngram=4), sequence([10, 11, 12, 13, 14, 15])
    drafter.draft([seq], [20])
    before = [list(column) for column in drafter._states[0]._columns]
    other = DraftForest.from_chains([15], [[60, 61]], ["other"])
    drafter.observe([seq], other, Verdict([[]], [[1]]), Observed(top_ids=torch.tensor([[1], [2], [3]])))
    assert drafter._states[0]._columns == before
    drafter.draft([seq], [20])
    drafter.observe([seq], other, Verdict([[]], [[1]]), Observed())
    assert drafter._states[0]._columns == before


def test_state_is_bounded_and_forgotten() -> None:
    drafter, seq = LookaheadDrafter(), sequence(range(3 * POOL_TOKENS))
    drafter.draft([seq], [4])
    assert len(drafter._states[0].pool) == POOL_TOKENS
    drafter.forget(0)
    drafter.forget(0)
    assert not drafter._states


def test_numbers_that_make_no_sense() -> None:
    for bad in ({"window": 0}, {"ngram": 1}, {"guesses": 0}, {"share": 1.5}, {"doubt": -1}):
        with pytest.raises(ValueError, match="lookahead needs"):
            LookaheadDrafter(**bad)
