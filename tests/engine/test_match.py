"""Verifier `match`: the stream of tokens is that of plain decoding, whatever the drafts are."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.noise import gumbel
from engine.sequence import Sequence as Seq
from engine.target_law import TargetLaw
from engine.tree import DraftForest
from engine.verifiers.match import MatchVerifier
from tests.toy import Guess, ToyLM, Tree, decode, no_guess, sequence

V = 17
EOS = frozenset({3})
LENGTH = 14


def verdict(trees: list[Tree], scores: torch.Tensor, **params: object) -> tuple[list[list[int]], list[list[int]]]:
    forest = DraftForest.from_parents(trees)
    found = MatchVerifier().verify(forest, scores, [sequence([tokens[0]], b, **params) for b, (tokens, _) in enumerate(trees)])
    return found.nodes, found.tokens


def says(*tokens: int) -> torch.Tensor:
    """Scores whose best token at row i is tokens[i], far above the reach of noise."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).float() * 100


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_path_that_carries_the_targets_tokens_is_accepted(temperature: float) -> None:
    #            0: root 9
    #        1: 4        2: 5
    #    3: 6   4: 7        5: 6
    tree = ([9, 4, 5, 6, 7, 6], [-1, 0, 0, 1, 1, 2])
    assert verdict([tree], says(4, 7, 0, 0, 1, 0), temperature=temperature) == ([[1, 4]], [[4, 7, 1]])
    assert verdict([tree], says(5, 7, 6, 0, 1, 2), temperature=temperature) == ([[2, 5]], [[5, 6, 2]])
    assert verdict([tree], says(8, 7, 6, 0, 1, 2), temperature=temperature) == ([[]], [[8]])
    assert verdict([tree], says(4, 5, 0, 0, 0, 0), temperature=temperature) == ([[1]], [[4, 5]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_twins_among_siblings_and_several_trees(temperature: float) -> None:
    twins = ([9, 4, 4, 6], [-1, 0, 0, 1])
    bare = ([2], [-1])
    chain = ([1, 4, 5], [-1, 0, 1])
    scores = says(4, 6, 0, 8, 7, 4, 5, 0)
    found = verdict([twins, bare, chain], scores, temperature=temperature)
    assert found == ([[1, 3], [], [1, 2]], [[4, 6, 8], [7], [4, 5, 0]])


def test_noise_is_addressed_by_the_output_position() -> None:
    scores = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    seq = sequence([1, 2, 3], seed=77, temperature=1.0)
    seq.commit([4, 5])
    noise = gumbel([77] * 3, [0] * 3, [2, 3, 4], vocab_size=V)
    expected = (scores + noise).argmax(-1).tolist()
    forest = DraftForest.from_chains([5], [expected[:2]])
    assert MatchVerifier().verify(forest, scores, [seq]).tokens == [expected]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("poison", [torch.nan, -torch.inf])
def test_an_unusable_row_ends_its_tree_where_plain_decoding_would_end(temperature: float, poison: float) -> None:
    chain = ([9, 4, 5], [-1, 0, 1])
    at_root, below, unreached = says(4, 5, 6), says(4, 5, 6), says(4, 7, 6)
    at_root[0] = below[2] = unreached[2] = poison
    healthy = says(4, 5, 6)
    found = verdict([chain] * 4, torch.cat([at_root, below, unreached, healthy]), temperature=temperature)
    assert found == ([[], [1], [1], [1, 2]], [[], [4, 5], [4, 7], [4, 5, 6]])


def test_greedy_and_sampled_sequences_share_a_batch() -> None:
    scores = torch.randn(4, V, generator=torch.Generator().manual_seed(3))
    seqs = [sequence([i], i, temperature=float(i % 2), seed=i) for i in range(4)]
    together = MatchVerifier().verify(DraftForest.roots([0, 1, 2, 3]), scores, seqs).tokens
    alone = [MatchVerifier().verify(DraftForest.roots([i]), scores[i : i + 1], [seqs[i]]).tokens[0] for i in range(4)]
    assert together == alone
    assert [together[0], together[2]] == [[int(scores[0].argmax())], [int(scores[2].argmax())]]


# Invisible: for every parameter and every draft, the stream equals that of budget 0.


def garbage(rng: random.Random) -> Guess:
    """Trees of random shape, random tokens, twins among siblings."""

    def guess(seq: Seq) -> Tree:
        nodes = rng.randint(0, 7)
        return [seq.tokens[-1], *(rng.randrange(V) for _ in range(nodes))], [-1, *(rng.randrange(i + 1) for i in range(nodes))]

    return guess


def informed(truth: dict[int, list[int]], rng: random.Random) -> Guess:
    """Trees that follow the true stream two times in three, and are then pruned at random: an anticipating controller."""

    def guess(seq: Seq) -> Tree:
        ahead = truth[seq.seq_id][seq.num_output :]
        tokens, parents, depth = [seq.tokens[-1]], [-1], [0]
        for i in range(rng.randint(0, 7)):
            parent = rng.choice([i, rng.randrange(i + 1)])
            right = depth[parent] < len(ahead) and rng.random() < 0.67
            tokens.append(ahead[depth[parent]] if right else rng.randrange(V))
            parents.append(parent)
            depth.append(depth[parent] + 1)
        kept = rng.randint(1, len(tokens))
        return tokens[:kept], parents[:kept]

    return guess


token_ids = st.integers(0, V - 1)
parameters = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 2.0]), "seed": st.integers(0, 2**64 - 1)},
    optional={
        "top_k": st.integers(1, V),
        "top_p": st.sampled_from([0.1, 0.6, 0.95]),
        "min_p": st.sampled_from([0.01, 0.3]),
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.6, 0.9]),
        "logit_bias": st.dictionaries(token_ids, st.sampled_from([-100.0, 1.5]), max_size=3),
        "allowed_token_ids": st.lists(st.integers(4, V - 1), min_size=1, max_size=9),
        "bad_words": st.lists(st.lists(st.integers(4, 9), min_size=2, max_size=3), max_size=4),
        "min_tokens": st.integers(1, 9),
        "stop_token_ids": st.lists(token_ids, min_size=1, max_size=2),
        "ignore_eos": st.booleans(),
    },
)


def streams(lm: ToyLM, several: dict[int, dict[str, Any]], guess: Guess) -> dict[int, list[int]]:
    """The output of each sequence, decoded as one batch."""
    seqs = [sequence([i, 1], i, EOS, **params) for i, params in several.items()]
    outputs = decode(lm, seqs, guess, MatchVerifier(), LENGTH, TargetLaw(V, EOS, "cpu"))
    return dict(zip(several, outputs, strict=True))


def solvable(p: dict[str, Any]) -> bool:
    """False where the parameters together may allow nothing: such a sequence ends in an error, drafted or not."""
    allowed = set(p.get("allowed_token_ids", range(V)))
    masked = set(p.get("stop_token_ids", [])) | EOS | {word[-1] for word in p.get("bad_words", [])}
    return bool(allowed - masked)


@settings(max_examples=60, deadline=None)
@given(
    several=st.lists(parameters.filter(solvable), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_no_draft_changes_the_stream(several: list[dict[str, Any]], dtype: torch.dtype, seed: int) -> None:
    lm = ToyLM(V, seed, sharpness=2.0, dtype=dtype)
    batch = dict(enumerate(several))
    alone = {i: streams(lm, {i: params}, no_guess)[i] for i, params in batch.items()}
    assert streams(lm, batch, no_guess) == alone
    assert streams(lm, batch, garbage(random.Random(seed))) == alone
    assert streams(lm, batch, informed(alone, random.Random(seed))) == alone


def test_good_drafts_are_accepted() -> None:
    # The test above would pass if nothing were ever accepted.
    lm = ToyLM(V, 5, sharpness=2.0)
    params: dict[int, dict[str, Any]] = {
        0: {"temperature": 1.0, "seed": 4, "top_p": 0.9, "ignore_eos": True},
        1: {"temperature": 0.0, "frequency_penalty": 0.5, "ignore_eos": True},
    }
    plain = streams(lm, params, no_guess)
    forwards = 0

    def oracle(seq: Seq) -> Tree:
        nonlocal forwards
        forwards += 1
        chain = plain[seq.seq_id][seq.num_output :][:4]
        return [seq.tokens[-1], *chain], list(range(-1, len(chain)))

    assert streams(lm, params, oracle) == plain
    assert forwards == 2 * -(-LENGTH // 5)
