"""The drafters that need no model: what they guess, and that it is a function of the committed tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.drafters.ngram import NgramDrafter
from engine.drafters.none import NoneDrafter
from engine.drafters.prediction import PredictionDrafter
from engine.protocols import Drafter
from engine.request import Request, SamplingParams
from engine.sequence import Sequence as Seq

MAKERS: dict[str, Callable[[], Drafter]] = {"none": NoneDrafter, "ngram": NgramDrafter, "prediction": PredictionDrafter}


def sequence(prompt: Sequence[int], output: Sequence[int] = (), prediction: Sequence[int] = (), seq_id: int = 0) -> Seq:
    params = SamplingParams(max_tokens=10_000)
    request = Request(request_id="r", prompt_ids=list(prompt), params=params, prediction_ids=list(prediction))
    seq = Seq(seq_id, request)
    seq.commit(list(output))
    return seq


def chain(drafter: Drafter, seq: Seq, budget: int = 8) -> list[int]:
    forest = drafter.draft([seq], [budget])
    tokens = forest.token.tolist()
    assert tokens[0] == seq.tokens[-1]
    assert forest.is_chains
    assert forest.drafter == [drafter.name if len(tokens) > 1 else ""]
    return tokens[1:]


def replay(drafter: Drafter, seq: Seq, output: Sequence[int], budget: int = 8) -> int:
    """Commit `output` as a model that says exactly this would; the number of steps."""
    steps, done = 0, 0
    while done < len(output):
        guess = chain(drafter, seq, budget)
        right = 0
        while right < len(guess) and done + right < len(output) and guess[right] == output[done + right]:
            right += 1
        seq.commit(list(output[done : done + right + 1]))
        done += right + 1
        steps += 1
    return steps


@pytest.mark.parametrize("name", MAKERS)
def test_budgets_are_kept_and_batches_do_not_mix(name: str) -> None:
    rng = random.Random(0)
    make = MAKERS[name]
    seqs = [
        sequence([rng.randrange(4) for _ in range(30)], [1, 2], [rng.randrange(4) for _ in range(9)], seq_id)
        for seq_id in range(6)
    ]
    budgets = [0, 1, 2, 5, 100, 3]
    forest = make().draft(seqs, budgets)
    assert forest.num_trees == 6
    for b, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
        assert forest.size(b) - 1 <= budget
        assert forest.token[forest.nodes(b)].tolist()[1:] == chain(make(), seq, budget)
    assert make().draft([], []).num_trees == 0


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["ngram", "prediction"]),
    text=st.lists(st.integers(0, 3), min_size=3, max_size=60),
    prediction=st.lists(st.integers(0, 3), max_size=30),
    cuts=st.lists(st.integers(1, 4), min_size=20, max_size=20),
)
def test_a_guess_is_a_function_of_the_committed_tokens(
    name: str, text: list[int], prediction: list[int], cuts: list[int]
) -> None:
    # In whatever portions they were committed, and after being forgotten (an abort, a preemption, a restart).
    drafter = MAKERS[name]()
    seq = sequence(text[:2], [], prediction)
    rest = text[2:]
    for i, cut in enumerate(cuts):
        if i == 7:
            drafter.forget(seq.seq_id)
        fresh = sequence(text[:2], seq.tokens[2:], prediction)
        assert chain(drafter, seq) == chain(MAKERS[name](), fresh)
        seq.commit(rest[:cut])
        rest = rest[cut:]


def test_none_never_guesses() -> None:
    assert chain(NoneDrafter(), sequence([1, 2, 1, 2, 1])) == []


# ngram


def test_ngram_follows_the_longest_match_and_of_equal_ones_the_latest() -> None:
    #         longest: 1 2 3        latest of 2 3
    text = [1, 2, 3, 7, 7, 9, 2, 3, 8, 8, 0, 1, 2, 3]
    assert chain(NgramDrafter(), sequence(text), 2) == [7, 7]
    assert chain(NgramDrafter(), sequence([5, 2, 3, 7, 9, 2, 3, 8, 6, 2, 3]), 2) == [8, 6]
    assert chain(NgramDrafter(), sequence([5, 4, 2, 3])) == []
    assert chain(NgramDrafter(), sequence([4])) == []


def test_ngram_trusts_a_match_for_what_it_is_long() -> None:
    text = list(range(100, 140))
    for matched, drafted in ((1, 1), (2, 3), (4, 7), (10, 19)):
        seq = sequence([*text, 1, *text[5 : 5 + matched]])
        assert chain(NgramDrafter(), seq, 30) == text[5 + matched : 5 + matched + drafted]


def test_ngram_respects_its_shortest_match() -> None:
    seq = sequence([5, 6, 7, 8, 9, 1, 6, 7])
    assert chain(NgramDrafter(min_n=2, trust=9), seq, 2) == [8, 9]
    assert chain(NgramDrafter(min_n=3, max_n=3), seq) == []
    for bad in ({"min_n": 0}, {"min_n": 3, "max_n": 2}, {"trust": 0}):
        with pytest.raises(ValueError, match="ngram"):
            NgramDrafter(**bad)


def test_ngram_goes_on_with_a_repetition_as_far_as_the_budget_reaches() -> None:
    assert chain(NgramDrafter(), sequence([9, 1, 2, 3] + [1, 2, 3] * 4), 12) == [1, 2, 3] * 4
    assert chain(NgramDrafter(), sequence([4] * 9), 8) == [4] * 8


def test_ngram_reads_each_token_once() -> None:
    class Counting(list):
        reads = 0

        def __getitem__(self, key: int | slice) -> int | list[int]:  # type: ignore[override]
            Counting.reads += 1
            return super().__getitem__(key)

    rng = random.Random(1)
    seq = sequence([rng.randrange(1000) for _ in range(4000)])
    seq.tokens = Counting(seq.tokens)
    drafter = NgramDrafter()
    for _ in range(2):  # portions
        drafter.draft([seq], [8])
    assert 4000 < Counting.reads < 5000
    Counting.reads = 0
    for _ in range(10):
        seq.tokens.append(rng.randrange(1000))
        drafter.draft([seq], [8])
    assert Counting.reads < 10 * 300  # a few looks, not another pass over the context


# prediction

TEXT = list(range(10, 70))


def test_prediction_drafts_from_the_start_and_behind_what_was_accepted() -> None:
    drafter, seq = PredictionDrafter(), sequence([1, 2], [], TEXT)
    assert chain(drafter, seq, 5) == TEXT[:5]
    seq.commit(TEXT[:3])
    assert chain(drafter, seq, 5) == TEXT[3:8]
    assert chain(drafter, seq, 500) == TEXT[3:]
    seq.commit(TEXT[3:])
    assert chain(drafter, seq, 5) == []
    assert chain(drafter, sequence([1, 2])) == []


def test_an_exact_prediction_is_accepted_whole() -> None:
    assert replay(PredictionDrafter(), sequence([1], [], TEXT), TEXT, budget=8) == -(-len(TEXT) // 9)


EDITS = {
    "one token replaced": ([*TEXT[:20], 99, *TEXT[21:]], 2),
    "tokens inserted": ([*TEXT[:20], 99, 98, 97, 96, 95, 94, *TEXT[20:]], 9),
    "tokens deleted": (TEXT[:20] + TEXT[30:], 4),
    "a lead-in": ([99, 98, 97, 96, 95, 94, 93, 92, *TEXT], 11),
    "two blocks swapped": (TEXT[40:] + TEXT[:40], 7),
}


@pytest.mark.parametrize("edit", EDITS)
def test_the_cursor_finds_its_place_again(edit: str) -> None:
    output, most_steps_lost = EDITS[edit]
    steps = replay(PredictionDrafter(), sequence([1], [], TEXT), output, budget=8)
    assert steps <= -(-len(output) // 9) + most_steps_lost
    assert steps < len(output) / 2.5


def test_where_a_text_repeats_itself_the_cursor_stays_in_its_place() -> None:
    # The same four tokens stand before every value: a search alone would fall back to another of them.
    block = [5, 6, 7, 8]
    text = [token for value in range(20, 40) for token in (*block, value)]
    replaced = [*text[:52], 99, *text[53:]]
    assert replay(PredictionDrafter(), sequence([1], [], text), replaced, budget=8) <= -(-len(text) // 9) + 2
    inserted = [*text[:52], 99, 98, 97, *text[52:]]
    assert replay(PredictionDrafter(), sequence([1], [], text), inserted, budget=8) <= -(-len(text) // 9) + 4


def drafted(seq: Seq, output: Sequence[int]) -> int:
    """Draft nodes shown while `output` is committed one token at a time."""
    drafter, nodes = PredictionDrafter(), 0
    for token in output:
        nodes += len(chain(drafter, seq, 8))
        seq.commit([token])
    return nodes


def test_a_wrong_prediction_soon_stops_costing() -> None:
    assert drafted(sequence([1], [], TEXT), range(200, 300)) <= 9
    # So few distinct tokens that the last ones are always found somewhere, by chance.
    rng = random.Random(3)
    prediction, output = ([rng.randrange(6) for _ in range(300)] for _ in range(2))
    assert drafted(sequence([1], [], prediction), output) < 0.5 * len(output)
