"""What suffix, token_recycling, stand and aded guess, and from what."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.drafters.aded import AdedDrafter
from engine.drafters.stand import StandDrafter
from engine.drafters.suffix import SuffixDrafter
from engine.drafters.token_recycling import TokenRecyclingDrafter
from engine.noise import gumbel
from engine.protocols import Drafter, Observed, Siblings
from engine.request import Request, SamplingParams
from engine.sequence import Sequence as Seq
from engine.tree import DraftForest, Verdict

TOP = 8
Paths = dict[tuple[int, ...], float]


def sequence(seq_id: int, prompt: Sequence[int], output: Sequence[int] = (), salt: str = "", **params: float) -> Seq:
    sampling = SamplingParams(**({"max_tokens": 10_000, "temperature": 0.0} | params))  # type: ignore[arg-type]  # of many types
    seq = Seq(seq_id, Request(request_id="r", prompt_ids=list(prompt), params=sampling, cache_salt=salt))
    seq.commit(list(output))
    return seq


def draft(drafter: Drafter, seq: Seq, budget: int = 8) -> Paths:
    """Path of every draft node -> its confidence."""
    forest = drafter.draft([seq], [budget])
    assert forest.confidence is not None
    return {tuple(forest.path(0, node)): float(forest.confidence[node]) for node in range(1, forest.num_nodes)}


def longest(paths: Paths) -> list[int]:
    return list(max(paths, key=len, default=()))


def commit(drafter: Drafter, seq: Seq, output: Sequence[int], signals: Observed | None = None) -> None:
    """As a step would that drafted nothing, token by token."""
    for token in output:
        forest = DraftForest.roots([seq.tokens[-1]])
        drafter.observe([seq], forest, Verdict([[]], [[token]]), signals or Observed())
        seq.commit([token])


def numbers(count: int, seed: int, below: int = 1000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(below) for _ in range(count)]


# suffix

TAIL = [901, 902, 903, 904, 905, 906, 907]  # what a chat template puts between every question and its answer


def answered(drafter: Drafter, seq_id: int, prompt: list[int], output: list[int], salt: str = "") -> None:
    seq = sequence(seq_id, prompt, salt=salt)
    commit(drafter, seq, output)
    drafter.forget(seq_id)


def test_a_prompt_asked_again_is_drafted_from_its_first_token_whatever_was_asked_between() -> None:
    drafter = SuffixDrafter()
    prompt, answer = numbers(40, 1) + TAIL, numbers(100, 2)
    answered(drafter, 0, prompt, answer)
    for other in range(1, 30):  # the same template, other questions
        answered(drafter, other, numbers(40, 10 + other) + TAIL, numbers(50, 50 + other))
    seq = sequence(99, prompt)
    assert longest(draft(drafter, seq, 32)) == answer[:32]
    steps = 0
    while seq.num_output < len(answer):
        guess = longest(draft(drafter, seq, 32))
        assert guess == answer[seq.num_output :][: len(guess)]
        drafter.observe([seq], DraftForest.roots([seq.tokens[-1]]), Verdict([[]], [[0]]), Observed())
        seq.commit(answer[seq.num_output :][: len(guess) + 1])
        steps += 1
    assert steps == 4


def test_the_place_is_kept_where_the_answers_begin_alike() -> None:
    drafter = SuffixDrafter()
    opening = [800, 801, 802, 803]  # "Sure, here is ..."
    for seq_id in range(20):
        answered(drafter, seq_id, numbers(40, seq_id) + TAIL, opening + numbers(50, 100 + seq_id))
    seq = sequence(99, numbers(40, 3) + TAIL)
    draft(drafter, seq)
    seq.commit(opening)
    assert longest(draft(drafter, seq, 16)) == numbers(50, 103)[:16]


def test_a_sibling_that_still_runs_is_heard() -> None:
    drafter = SuffixDrafter()
    prompt = numbers(30, 1)
    ahead, behind = sequence(0, prompt), sequence(1, prompt)
    commit(drafter, ahead, numbers(20, 2))
    drafter.observe([ahead], DraftForest.roots([0]), Verdict([[]], [[5]]), Observed())
    assert longest(draft(drafter, behind, 12)) == numbers(20, 2)[:12]


def test_where_matches_disagree_the_draft_branches_and_the_longer_match_is_preferred() -> None:
    drafter = SuffixDrafter(least=0.0)
    paths = draft(drafter, sequence(0, [1, 2, 3, 50, 51, 9, 3, 60, 61, 8, 3, 70, 71, 4, 1, 2, 3]), 30)
    firsts = {path[0]: p for path, p in paths.items() if len(path) == 1}
    assert set(firsts) == {50, 60, 70}
    assert firsts[50] > firsts[60] == pytest.approx(firsts[70])
    assert sum(firsts.values()) < 0.71
    agreed = draft(drafter, sequence(1, [1, 2, 3, 50, 51, 9, 2, 3, 50, 51, 7, 1, 2, 3]), 2)
    assert longest(agreed) == [50, 51] and agreed[(50,)] == pytest.approx(0.71)


def test_a_repetition_goes_on_as_far_as_the_budget_reaches() -> None:
    assert longest(draft(SuffixDrafter(), sequence(0, [9, 1, 2, 3] + [1, 2, 3] * 4), 20))[:12] == [1, 2, 3] * 4


def test_the_longer_the_match_the_surer() -> None:
    text = numbers(60, 5)
    found = [draft(SuffixDrafter(), sequence(0, [*text, 1, *text[10 : 10 + n]]), 1) for n in (1, 2, 3, 6, 12, 30)]
    sure = [paths[(text[10 + n],)] for paths, n in zip(found, (1, 2, 3, 6, 12, 30), strict=True)]
    assert sure == sorted(sure) and len(set(sure)) == 6


def test_old_answers_leave_and_late_ones_stay() -> None:
    drafter = SuffixDrafter(memory_bytes=100_000)
    for seq_id in range(60):
        answered(drafter, seq_id, numbers(40, seq_id), numbers(50, 100 + seq_id))
        assert drafter.num_bytes <= 100_000
    assert draft(drafter, sequence(98, numbers(40, 0))) == {}
    assert longest(draft(drafter, sequence(99, numbers(40, 59)))) == numbers(50, 159)[:8]


def test_a_running_sequence_survives_the_loss_of_its_salt() -> None:
    drafter = SuffixDrafter(memory_bytes=30_000)
    seq = sequence(0, numbers(30, 1), salt="lost")
    commit(drafter, seq, numbers(10, 2))
    for other in range(1, 20):
        answered(drafter, other, numbers(30, 20 + other), numbers(40, 60 + other), salt=f"salt {other}")
    commit(drafter, seq, numbers(30, 3))
    drafter.forget(0)
    twin = sequence(40, [5, *numbers(30, 3)[:15]], salt="lost")
    assert longest(draft(drafter, twin)) == numbers(30, 3)[15:23]


def test_suffix_refuses_numbers_that_make_no_sense() -> None:
    for bad in ({"matches": 0}, {"least": 1.5}, {"growth": 0.5}):
        with pytest.raises(ValueError, match="suffix"):
            SuffixDrafter(**bad)  # type: ignore[arg-type]  # of many types


# token_recycling


def rows(*tops: Sequence[int]) -> Observed:
    """The likeliest tokens of each node, best first, with falling logits."""
    ids = torch.tensor([[*top, *range(9000, 9000 + TOP - len(top))] for top in tops])
    return Observed(ids, torch.linspace(4, 0, TOP).expand(len(tops), TOP).clone())


def judged(
    drafter: Drafter, seq: Seq, tokens: list[int], parents: list[int], path: list[int], verdict: list[int], *tops: list[int]
) -> None:
    forest = DraftForest.from_parents([([seq.tokens[-1], *tokens], [-1, *parents])], ["other"])
    drafter.observe([seq], forest, Verdict([path], [verdict]), rows(*tops))
    seq.commit(verdict)


def test_the_runners_up_of_a_token_are_its_children_next_time() -> None:
    drafter = TokenRecyclingDrafter(least=0.0)
    seq = sequence(0, [1, 2])
    judged(drafter, seq, [], [], [], [10], [10, 11, 12])  # behind 2
    judged(drafter, seq, [20, 21], [0, 0], [1], [20, 2], [20, 22], [2], [30, 31])  # behind 10, 20 and, though it fell, 21
    paths = draft(drafter, seq, 12)
    assert [path for path in paths if len(path) == 1][:3] == [(10,), (11,), (12,)]
    assert {(10, 20), (10, 22), (10, 20, 2)} <= set(paths)
    assert draft(drafter, sequence(1, [7, 21]), 2).keys() == {(30,), (31,)}


def test_of_two_rows_of_one_token_the_committed_one_is_kept() -> None:
    for order in ([1, 2], [2, 1]):
        drafter = TokenRecyclingDrafter()
        tops = {1: [50], 2: [60]}  # node 1 and node 2 carry the same token below different parents; one of them stands
        seq = sequence(0, [1, 2])
        parents = [0, 0, 1, 2]
        stands = order[0]
        judged(
            drafter, seq, [5, 6, 7, 7], parents, [stands, stands + 2], [4 + stands, 7, tops[stands][0]],
            [5, 6], [7], [7], [tops[1][0], 1], [tops[2][0], 1],
        )  # fmt: skip
        assert (tops[stands][0],) in draft(drafter, sequence(1, [3, 7]), 1)


def test_ranks_that_prove_right_are_trusted_more() -> None:
    drafter = TokenRecyclingDrafter()
    seq = sequence(0, [1, 2])
    judged(drafter, seq, [], [], [], [2], [2, 3])
    before = draft(drafter, seq, 1)
    for _ in range(60):
        judged(drafter, seq, [], [], [], [2], [2, 3])
    assert draft(drafter, seq, 1)[(2,)] > before[(2,)] + 0.1


@pytest.mark.parametrize("make", [TokenRecyclingDrafter, StandDrafter])
def test_a_step_without_its_rows_is_an_error(make: type[TokenRecyclingDrafter] | type[StandDrafter]) -> None:
    with pytest.raises(ValueError, match="no likeliest tokens"):
        make().observe([sequence(0, [1])], DraftForest.roots([1]), Verdict([[]], [[2]]), Observed())
    with pytest.raises(ValueError, match="least"):
        make(least=2.0)


# stand


def law(*shares: float) -> Observed:
    """A row whose tokens 100, 101, ... have these shares of the probability."""
    odds = torch.tensor([*shares, *[1e-9] * (TOP - len(shares))])
    return Observed(torch.arange(100, 100 + TOP).unsqueeze(0), odds.log().unsqueeze(0))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_where_the_law_is_known_the_first_child_is_the_token_that_will_be_drawn(temperature: float) -> None:
    drafter = StandDrafter(least=0.0)
    assert drafter.siblings is Siblings.COUPLED
    shares = (0.4, 0.3, 0.2, 0.1)
    commit(drafter, sequence(0, [1, 2, 3]), [100], law(*shares))
    ids = torch.arange(100, 104).unsqueeze(0)
    drawn = set()
    for seed in range(200):
        seq = sequence(1, [1, 2, 3], temperature=temperature, seed=seed)
        scores = torch.tensor(shares).log() / temperature + gumbel([seed], [0], [0], ids)[0]
        order = [100 + int(i) for i in scores.argsort(descending=True)]
        firsts = [path[0] for path in draft(drafter, seq, 3)]
        assert firsts == order[: len(firsts)]
        drawn.add(firsts[0])
    assert len(drawn) >= 3


def test_noise_is_that_of_the_nodes_position() -> None:
    drafter = StandDrafter(least=0.0)
    teacher = sequence(0, [1, 2, 3])
    for _ in range(4):
        commit(drafter, teacher, [100], law(0.5, 0.5))
    seq = sequence(1, [1, 2, 3], [100, 100], temperature=1.0, seed=3)
    for path in draft(drafter, seq, 12):
        if len(path) == 2 and path[0] == 100:
            ids = torch.tensor([[100, 101]])
            best = 100 + int(gumbel([3], [0], [3], ids)[0].argmax())
            assert path[1] == best  # the first of the two to be taken
            break
    else:
        raise AssertionError("no grandchild was drafted")


def test_the_longest_known_context_speaks_and_laws_are_averaged() -> None:
    drafter = StandDrafter(least=0.0)
    commit(drafter, sequence(0, [1, 2, 3]), [100], law(0.9, 0.1))
    commit(drafter, sequence(1, [7, 8, 3]), [100], law(0.1, 0.9))
    assert next(iter(draft(drafter, sequence(2, [1, 2, 3]), 1))) == (100,)
    assert next(iter(draft(drafter, sequence(3, [7, 8, 3]), 1))) == (101,)
    averaged = draft(drafter, sequence(4, [5, 6, 3]), 2)  # one token of context: half and half
    assert averaged[(100,)] == pytest.approx(averaged[(101,)], rel=1e-3)
    assert averaged[(100,)] < draft(drafter, sequence(5, [1, 2, 3]), 1)[(100,)]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_corrupted_row_teaches_nothing(wrong: float) -> None:
    drafter = StandDrafter()
    broken = law(0.9, 0.1)
    assert broken.top_logits is not None
    broken.top_logits[0, 0] = wrong
    commit(drafter, sequence(0, [1, 2, 3]), [100], broken)
    assert draft(drafter, sequence(1, [1, 2, 3])) == {}


# aded


def test_pairs_are_followed_and_what_came_lately_comes_first() -> None:
    drafter = AdedDrafter(least=0.0)
    seq = sequence(0, [1, 2, 3, 9, 1, 2, 4, 9, 1, 2])
    paths = list(draft(drafter, seq, 20))
    assert paths.index((4,)) < paths.index((3,))
    assert {(3, 9), (4, 9), (4, 9, 1)} <= set(paths)
    assert draft(drafter, sequence(1, [5, 6])) == {}


def test_what_is_seen_often_is_trusted_more() -> None:
    drafter = AdedDrafter()
    once = draft(drafter, sequence(0, [1, 2, 3, 9, 1, 2]), 1)[(3,)]
    often = draft(drafter, sequence(1, [1, 2, 3] * 5 + [1, 2]), 1)[(3,)]
    assert once < often < 1


def test_a_pair_keeps_its_best_successors() -> None:
    drafter = AdedDrafter(fade=1.0, least=0.0)
    text = [token for follower in range(50, 80) for token in (1, 2, follower)]
    text = [1, 2, 40, 1, 2, 40, 1, 2, 40, *text, 1, 2]
    firsts = [path for path in draft(drafter, sequence(0, text), 64) if len(path) == 1]
    assert len(firsts) == 12 and (40,) in firsts


def test_prompts_teach_and_the_last_tokens_are_learned_when_a_sequence_leaves() -> None:
    drafter = AdedDrafter()
    seq = sequence(0, [1, 2, 3, 4])
    commit(drafter, seq, [5, 6, 7])
    drafter.forget(0)
    assert longest(draft(drafter, sequence(1, [1, 2]))) == [3, 4, 5, 6, 7]
    with pytest.raises(ValueError, match="aded"):
        AdedDrafter(fade=2.0)
    assert np.isfinite(drafter.num_bytes)
