"""The target law against a plain reading of its documentation, one node and one token at a time."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sequence import Sequence as Seq
from engine.target_law import TargetLaw, is_plain, node_paths
from engine.tree import DraftForest
from tests.toy import sequence

V = 24
EOS = frozenset({0, 5})


def spelled_out(logits: list[float], seq: Seq, path: list[int]) -> list[float]:
    """Scores of one node after masks, penalties and temperature, as the documentation says; truncation has its own tests."""
    p, row = seq.params, list(logits)
    output = seq.tokens[seq.num_prompt :] + path
    for token, bias in p.logit_bias.items():
        row[token] += bias
    if p.allowed_token_ids is not None:
        row = [value if token in p.allowed_token_ids else -math.inf for token, value in enumerate(row)]
    for word in p.bad_words:
        if len(word) == 1 or output[-(len(word) - 1) :] == word[:-1]:
            row[word[-1]] = -math.inf
    if len(output) < p.min_tokens:
        for token in set(p.stop_token_ids) | (set() if p.ignore_eos else EOS):
            row[token] = -math.inf
    for token in range(len(row)):
        if token in seq.tokens + path:
            row[token] = row[token] / p.repetition_penalty if row[token] > 0 else row[token] * p.repetition_penalty
        row[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty * (token in output)
    return row if p.greedy else [value / p.temperature for value in row]


def random_tree(rng: random.Random, root: int, nodes: int) -> tuple[list[int], list[int]]:
    return [root, *(rng.randrange(V) for _ in range(nodes))], [-1, *(rng.randrange(i + 1) for i in range(nodes))]


def forest_of(seqs: Sequence[Seq], rng: random.Random, most: int = 6) -> DraftForest:
    return DraftForest.from_parents([random_tree(rng, seq.tokens[-1], rng.randint(0, most)) for seq in seqs])


def check(law: TargetLaw, seqs: Sequence[Seq], rng: random.Random, dtype: torch.dtype = torch.float32) -> None:
    forest = forest_of(seqs, rng)
    logits = (torch.randn(forest.num_nodes, V, generator=torch.Generator().manual_seed(rng.randrange(1000))) * 3).to(dtype)
    before = logits.clone()
    scores = law(logits, seqs, forest)
    assert torch.equal(logits, before), "the raw logits are still needed for logprobs"
    for tree, seq in enumerate(seqs):
        rows = range(int(forest.start[tree]), int(forest.start[tree + 1]))
        for row, path in zip(rows, node_paths(forest, tree), strict=True):
            expected = torch.tensor(spelled_out(logits[row].double().tolist(), seq, path))
            torch.testing.assert_close(scores[row].float(), expected, rtol=1e-5, atol=1e-5)


tokens = st.integers(0, V - 1)
parameters = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 1.7]),
        "logit_bias": st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=4),
        "allowed_token_ids": st.lists(tokens, min_size=1, max_size=8),
        "bad_words": st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3), max_size=4),
        "min_tokens": st.integers(0, 8),
        "stop_token_ids": st.lists(tokens, max_size=3),
        "ignore_eos": st.booleans(),
        "repetition_penalty": st.sampled_from([0.7, 1.0, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.0, 0.5]),
        "frequency_penalty": st.sampled_from([-0.5, 0.0, 0.25]),
    },
)


@settings(max_examples=120, deadline=None)
@given(
    several=st.lists(parameters, min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_node_has_the_law_of_its_own_path(several: list[dict[str, Any]], seed: int, dtype: torch.dtype) -> None:
    rng = random.Random(seed)
    # Few distinct tokens, so that bad words complete and counts grow.
    seqs = [sequence([rng.randrange(6) for _ in range(rng.randint(1, 9))], i, **p) for i, p in enumerate(several)]
    law = TargetLaw(V, EOS, "cpu")
    for _ in range(3):
        check(law, seqs, rng, dtype)
        for seq in seqs:
            seq.commit([rng.randrange(6) for _ in range(rng.randint(1, 3))])
        rng.shuffle(seqs)


def test_where_nothing_is_asked_for_the_logits_come_back_untouched() -> None:
    asked = [{"temperature": 0.0, "top_p": 0.3}, {"temperature": 1.0}, {"temperature": 1e-6, "top_k": 2}]
    seqs = [sequence([i + 1], i, **params) for i, params in enumerate(asked)]
    assert all(is_plain(seq.params) for seq in seqs)
    logits = torch.randn(3, V).bfloat16()
    assert TargetLaw(V, EOS, "cpu")(logits, seqs, DraftForest.roots([1, 2, 3])) is logits


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 0.5},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1]},
        {"bad_words": [[1]]},
        {"min_tokens": 2},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
    ],
)
def test_no_parameter_is_mistaken_for_nothing(change: dict[str, Any]) -> None:
    seq = sequence([1, 2], **change)
    assert not is_plain(seq.params)
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(0))
    seq.commit([1])
    assert not torch.equal(TargetLaw(V, EOS, "cpu")(logits, [seq], DraftForest.roots([1])), logits)


def test_truncation_comes_last_and_per_node() -> None:
    # token 1 is penalised below the top 2 only where the path holds it; the penalty comes before the temperature.
    seq = sequence([9], top_k=2, frequency_penalty=1.5, temperature=0.5)
    forest = DraftForest.from_parents([([9, 1, 1], [-1, 0, 1])])
    logits = torch.zeros(3, V)
    logits[:, 1], logits[:, 2], logits[:, 3] = 4.0, 3.0, 2.0
    scores = TargetLaw(V, EOS, "cpu")(logits, [seq], forest)
    assert [row.isfinite().nonzero()[:, 0].tolist() for row in scores] == [[1, 2], [1, 2], [2, 3]]
    assert scores[1, 1].item() == (4.0 - 1.5) / 0.5
    assert scores[2, 3].item() == 2.0 / 0.5


def test_nodes_behind_a_token_that_is_ruled_out_are_all_that_may_stay_untruncated() -> None:
    seq = sequence([9], top_k=1)
    forest = DraftForest.from_parents([([9, 7, 3, 4, 7], [-1, 0, 0, 1, 1])])  # token 7 is the only one that top_k leaves
    logits = torch.zeros(5, V)
    logits[:, 7] = 1.0
    kept = TargetLaw(V, EOS, "cpu")(logits, [seq], forest).isfinite().sum(-1).tolist()
    assert [kept[i] for i in (0, 1, 4)] == [1, 1, 1]


def test_a_row_that_holds_nan_touches_no_other() -> None:
    seqs = [sequence([1], i, temperature=0.7, top_p=0.9, min_p=0.01, presence_penalty=0.3, logit_bias={3: 1.0}) for i in range(3)]
    forest = DraftForest.roots([1, 1, 1])
    logits = torch.randn(3, V)
    clean = TargetLaw(V, EOS, "cpu")(logits, seqs, forest)
    logits[1] = torch.nan
    spoilt = TargetLaw(V, EOS, "cpu")(logits, seqs, forest)
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])
    assert spoilt[1].isnan().all()


def test_a_law_that_allows_nothing_is_all_masked() -> None:
    seq = sequence([1], allowed_token_ids=[0, 5], min_tokens=3)
    scores = TargetLaw(V, EOS, "cpu")(torch.randn(1, V), [seq], DraftForest.roots([1]))
    assert (scores == -torch.inf).all()


def test_a_sequence_that_pauses_or_is_replaced_is_counted_anew() -> None:
    rng = random.Random(0)
    law = TargetLaw(V, EOS, "cpu")
    one, two = (sequence([i, 2, 2], i, temperature=0.0, frequency_penalty=0.5, repetition_penalty=1.2) for i in range(2))
    check(law, [one, two], rng)
    one.commit([4, 4])
    two.commit([2])
    check(law, [two], rng)
    one.commit([3])
    check(law, [one, two], rng)
    other = sequence([8], 0, temperature=0.0, frequency_penalty=0.7)  # same id, another request
    check(law, [other, two], rng)
