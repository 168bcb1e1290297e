"""Drafters rest and rasd: what the datastore says, as far as it goes, and what the sequence's own text adds."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import datastore
from engine.drafters.rasd import PREFERRED_BYTES, RasdDrafter
from engine.drafters.rest import RestDrafter
from engine.protocols import NO_SIGNALS, Observed, Signals
from engine.registry import make_drafter
from engine.request import Request, SamplingParams
from engine.sequence import Sequence as Seq
from engine.tree import DraftForest, Verdict

VOCAB = 100


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """After 1 2 3: 4 5 three times, 4 6 once, 7 twice; after 9 2 3: 8."""
    documents = [[1, 2, 3, 4, 5]] * 3 + [[1, 2, 3, 4, 6]] + [[1, 2, 3, 7]] * 2 + [[9, 2, 3, 8]]
    datastore.build(tmp_path / "a.store", documents, VOCAB, b"f" * 32)
    return tmp_path / "a.store"


def sequence(tokens: Sequence[int], seq_id: int = 0, salt: str = "") -> Seq:
    params = SamplingParams(max_tokens=1000)
    return Seq(seq_id, Request(request_id="r", prompt_ids=list(tokens), params=params, cache_salt=salt))


def paths(forest: DraftForest, tree: int = 0) -> dict[tuple[int, ...], float]:
    assert forest.confidence is not None
    first = int(forest.start[tree])
    return {
        tuple(forest.path(tree, node)): round(float(forest.confidence[first + node]), 3) for node in range(1, forest.size(tree))
    }


def judge(drafter: RasdDrafter, seq: Seq, top: list[int]) -> None:
    """A plain step after which the target's likeliest tokens behind the last one were `top`."""
    forest = DraftForest.roots([seq.tokens[-1]])
    drafter.observe([seq], forest, Verdict([[]], [[top[0]]]), Observed(top_ids=torch.tensor([top])))


def test_rest_drafts_the_most_frequent_prefixes_with_their_shares(path: Path) -> None:
    drafter = RestDrafter(path, VOCAB, doubt=0, floor=0)
    found = paths(drafter.draft([sequence([50, 1, 2, 3])], [10]))
    assert found == {(4,): 0.667, (4, 5): 0.75, (7,): 0.333, (4, 6): 0.25}
    assert list(paths(drafter.draft([sequence([50, 1, 2, 3])], [2]))) == [(4,), (4, 5)]
    assert RestDrafter(path, VOCAB, doubt=0, floor=0.4).draft([sequence([1, 2, 3])], [10]).num_drafts == 2


def test_rest_takes_the_longest_match_alone(path: Path) -> None:
    drafter = RestDrafter(path, VOCAB, doubt=0, floor=0)
    assert paths(drafter.draft([sequence([9, 2, 3])], [10])) == {(8,): 1.0}
    assert set(paths(drafter.draft([sequence([40, 2, 3])], [10]))) == {(4,), (4, 5), (7,), (4, 6), (8,)}
    assert drafter.draft([sequence([40, 3])], [10]).num_drafts == 0
    assert RestDrafter(path, VOCAB, shortest=1, floor=0).draft([sequence([40, 3])], [10]).num_drafts == 5


def test_one_occurrence_behind_few_tokens_says_little(path: Path) -> None:
    drafter = RestDrafter(path, VOCAB, doubt=2.0)
    assert paths(drafter.draft([sequence([9, 2, 3])], [1])) == {(8,): round(1 / (1 + 2 / 3), 3)}


def test_rest_never_reads_behind_the_end_of_a_document(path: Path) -> None:
    assert RestDrafter(path, VOCAB).draft([sequence([1, 2, 3, 7])], [5]).num_drafts == 0


def test_what_the_operator_forgot(path: Path) -> None:
    for name in ("rest", "rasd"):
        with pytest.raises(ValueError, match=f"drafter {name} needs a datastore"):
            make_drafter(name, {"datastore": None, "vocab_size": VOCAB, "eos_ids": frozenset()})
        with pytest.raises(ValueError, match="vocabulary of 100 tokens, the model has 50"):
            make_drafter(name, {"datastore": str(path), "vocab_size": 50})
        with pytest.raises(ValueError, match=f"{name} needs 1 <= shortest"):
            make_drafter(name, {"datastore": str(path)}, shortest=0)
        assert make_drafter(name, {"datastore": str(path), "vocab_size": VOCAB}).name == name


def test_rasd_merges_the_own_text_into_the_tree(path: Path) -> None:
    seq = sequence([1, 2, 3, 4, 20, 60, 1, 2, 3])  # its own text says 4 20, the datastore 4 5, 4 6 and 7
    found = paths(RasdDrafter(path, VOCAB, floor=0).draft([seq], [10]))
    assert {(4,), (4, 5), (4, 20), (7,)} <= set(found)
    assert found[4,] > paths(RestDrafter(path, VOCAB, floor=0).draft([seq], [10]))[4,]
    assert sum(path[:1] == (4,) for path in found) == len({path for path in found if path[:1] == (4,)})


def test_rasd_lets_the_longer_match_speak_louder(path: Path) -> None:
    own = [60, 61, 62, 63, 9, 2, 3]
    found = paths(RasdDrafter(path, VOCAB, floor=0).draft([sequence([*own, 30, 77, *own])], [10]))
    assert found[30,] > found[8,]


def test_rasd_leaves_out_what_the_target_would_not_begin_with(path: Path) -> None:
    drafter, seq = RasdDrafter(path, VOCAB, floor=0, top_k=8), sequence([1, 2, 3])
    judge(drafter, seq, [7, 30, 31, 32, 33, 34, 35, 36])
    assert set(paths(drafter.draft([seq], [10]))) == {(7,)}
    judge(drafter, seq, [30, 31, 32, 33, 34, 35, 36, 37])
    assert drafter.draft([seq], [10]).num_drafts == 0
    # Behind another pair of tokens, and for another tenant, nothing is known.
    assert drafter.draft([sequence([9, 2, 3], 1)], [10]).num_drafts == 0  # the same pair
    assert set(paths(drafter.draft([sequence([1, 2, 3], 2, "other")], [10]))) == {(4,), (4, 5), (7,), (4, 6)}


def test_rasd_asks_for_no_signals_unless_it_prunes(path: Path) -> None:
    drafter, seq = RasdDrafter(path, VOCAB, floor=0), sequence([1, 2, 3])
    assert drafter.needs == NO_SIGNALS and RasdDrafter(path, VOCAB, top_k=4).needs == Signals(top_k=4)
    judge(drafter, seq, [30] * 8)  # asked for by another drafter
    assert drafter.draft([seq], [10]).num_drafts == 4


def test_rasd_prunes_nothing_of_the_own_text(path: Path) -> None:
    drafter, seq = RasdDrafter(path, VOCAB, floor=0, top_k=8), sequence([1, 2, 3, 20, 60, 1, 2, 3])
    judge(drafter, seq, [30, 31, 32, 33, 34, 35, 36, 37])
    assert (20,) in paths(drafter.draft([seq], [10])) and (4,) not in paths(drafter.draft([seq], [10]))


def test_rasd_learns_from_every_judged_node(path: Path) -> None:
    drafter = RasdDrafter(path, VOCAB, floor=0, top_k=8)
    seq = sequence([50, 1])
    forest = DraftForest.from_parents([([1, 2, 60, 3], [-1, 0, 0, 1])], ["other"])
    rows = torch.tensor([[90], [91], [92], [7]]).repeat(1, 8)
    drafter.observe([seq], forest, Verdict([[]], [[90]]), Observed(top_ids=rows))
    assert set(paths(drafter.draft([sequence([1, 2, 3], 1)], [10]))) == {(7,)}
    drafter.observe([seq], forest, Verdict([[]], [[90]]), Observed())  # nobody asked for signals: nothing to learn
    drafter.observe([sequence([5])], DraftForest.roots([5]), Verdict([[]], [[1]]), Observed(top_ids=rows[:1]))


def test_what_rasd_keeps_is_bounded(path: Path) -> None:
    drafter = RasdDrafter(path, VOCAB, memory_bytes=64 << 10, top_k=8)
    rng = random.Random(0)
    for i in range(3000):
        judge(drafter, sequence([rng.randrange(VOCAB), rng.randrange(VOCAB)], i, f"tenant {i % 5}"), [rng.randrange(VOCAB)] * 8)
    assert drafter._preferred.num_bytes <= (64 << 10) + PREFERRED_BYTES
    for i in range(20):
        drafter.draft([sequence([1, 2, 3], i)], [3])
    assert len(drafter._own) == 20
    for i in range(20):
        drafter.forget(i)
    assert not drafter._own


def test_rasd_reads_its_own_text_once_and_finds_what_a_search_finds(path: Path) -> None:
    rng = np.random.default_rng(3)
    drafter, seq = RasdDrafter(path, VOCAB, shortest=2), sequence([70, 71])
    for _ in range(200):
        seq.tokens.append(70 + int(rng.integers(3)))
        drafter.draft([seq], [4])
        places, matched = drafter._own[0].find(seq.tokens, 16)
        text = seq.tokens
        lengths = {
            end: next(n for n in range(17) if n == 16 or n == end or text[end - 1 - n] != text[-1 - n])
            for end in range(2, len(text))
        }
        longest = max((n for n in lengths.values() if n >= 2), default=0)
        recent = [end for end in sorted(lengths, reverse=True) if lengths[end] >= 2][:32]
        seen = max((lengths[end] for end in recent), default=0)
        assert matched == seen <= longest
        assert places == [end for end in recent if lengths[end] == seen]
