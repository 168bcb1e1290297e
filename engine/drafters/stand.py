"""Drafter `stand`: the target's own earlier laws after the same last tokens, drawn from with the noise that the target will use.

STAND, "Accelerated Test-Time Scaling with Model-Free Speculative Sampling" (Song et al., arXiv 2506.04708, EMNLP 2025). A table
holds for n-grams the average law of the rows that were judged behind them (their 8 likeliest tokens). The children of a node
come from the longest n-gram that is known: for a greedy request the likeliest, for a sampled one those with the largest
log P / T + Gumbel noise. That is the paper's Gumbel-top-k, except that the noise is not from a pool but the very noise of that
position (engine/noise.py), so that draft and target err together: siblings are COUPLED, and the verifier must be `match`.

What differs further: the tree is no fixed shape found in advance but grown best first by the confidences; P is averaged over
the 8 likeliest tokens (the paper: 10); the table is kept per salt in bounded memory. Samples of one prompt share what they
learn. It knows what the target thought of n-grams, not what texts said: an n-gram that was only read in a prompt is
unknown to it.

Replayed on SmolLM2-135M's answers to 26 of our prompts (26 greedy, 52 at T = 0.7, 96 tokens at most; `bench.replay`, which
knows no rows of fallen nodes), budget 8, starting from an empty table, tokens per step:

                          greedy   T = 0.7   greedy, asked again
    as it is               1.40      1.72      5.37
    without the noise      1.40      1.68      5.37
    2-grams at most        1.38      1.67      3.91
    4-grams at most        1.40      1.72      6.06

So the shared noise is worth 2% there (in the paper Gumbel-top-k brought 10%). A draft takes 30 us greedy and 100 us with noise,
learning 40 to 100 us a step; 4-grams would cost a third more memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from struct import Struct

import numpy as np

from engine.growth import NO_BRANCHES, Branches, forest_of, grow
from engine.noise import word
from engine.protocols import Observed, Siblings, Signals
from engine.sequence import Sequence
from engine.shared_state import Generations, SaltedStore
from engine.tree import DraftForest, Verdict

TOP = 8
LAW = Struct(f"={TOP}i{TOP}ff")  # tokens, their probabilities, how many rows were averaged
ENTRY_BYTES = 330  # a law as bytes, its key and its share of the dict
LONGEST = 3  # tokens of an n-gram
RELIABILITY = (0.5, 0.7, 0.85)  # how far a law behind 1, 2 and 3 tokens is trusted
NEGLIGIBLE = 0.01  # tokens less likely than this get no noise: 3 us each
GREEDY_SHARPNESS = 2.0  # a greedy target takes the likeliest token more often than P says

Tail = tuple[int, ...]  # the last LONGEST tokens of a node's path, or fewer where the text is shorter


class StandDrafter:
    """least: nodes whose path is less likely than this are not drafted. ValueError for a number that makes no sense."""

    name = "stand"
    needs = Signals(top_k=TOP)
    siblings = Siblings.COUPLED

    def __init__(self, memory_bytes: int = 64 << 20, least: float = 0.05) -> None:
        if not 0 <= least <= 1:
            raise ValueError(f"stand needs 0 <= least <= 1, not {least}")
        self.least = least
        self._laws: SaltedStore[Generations[Tail, bytes]] = SaltedStore(_generations, memory_bytes)

    @property
    def num_bytes(self) -> int:
        """Of what outlives the sequences."""
        return self._laws.num_bytes

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        trees = [self._tree(seq, budget) if budget > 0 else NO_BRANCHES for seq, budget in zip(seqs, budgets, strict=True)]
        return forest_of([seq.tokens[-1] for seq in seqs], trees, self.name)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """Every judged row of every tree. Raises ValueError when the rows' likeliest tokens are missing."""
        if signals.top_ids is None or signals.top_logits is None:
            raise ValueError("stand was given no likeliest tokens")
        ids = signals.top_ids[:, :TOP].cpu().numpy().astype(np.int32)
        odds = _softmax(signals.top_logits[:, :TOP].float().cpu().numpy())
        packed = np.column_stack((ids, odds.view(np.int32), np.ones(len(ids), np.float32).view(np.int32))).tobytes()
        usable = np.isfinite(odds).all(axis=1).tolist()  # a corrupted row must not outlive its request
        tokens, parents, starts = forest.token.tolist(), forest.parent.tolist(), forest.start.tolist()
        for b, seq in enumerate(seqs):
            salt = seq.request.cache_salt
            laws = self._laws.get(salt)
            first = starts[b]
            tails = [tuple(seq.tokens[-LONGEST:])]
            for node in range(first + 1, starts[b + 1]):
                tails.append((*tails[parents[node]], tokens[node])[-LONGEST:])
            stood = {0, *verdict.nodes[b]}
            for node, tail in enumerate(tails):
                if not usable[first + node]:
                    continue
                law = packed[(first + node) * LAW.size : (first + node + 1) * LAW.size]
                _learn(laws, tail, law, 1 if node in stood else 2)
            self._laws.settle(salt)

    def forget(self, seq_id: int) -> None:
        """It keeps nothing of a sequence."""

    def _tree(self, seq: Sequence, budget: int) -> Branches:
        laws = self._laws.find(seq.request.cache_salt)
        if laws is None:
            return NO_BRANCHES
        guess = _Guess(laws, seq)
        return grow((tuple(seq.tokens[-LONGEST:]), 0), guess.children, budget, self.least)


class _Guess:
    """The children of the nodes of one sequence's tree in one step."""

    def __init__(self, laws: Generations[Tail, bytes], seq: Sequence) -> None:
        self._laws = laws
        self._seq = seq
        self._noise: dict[tuple[int, int], float] = {}

    def children(self, state: tuple[Tail, int]) -> Iterable[tuple[int, float, tuple[Tail, int]]]:
        tail, depth = state
        tail = tail[-LONGEST:]
        for skipped in range(len(tail)):
            law = self._laws.find(tail[skipped:])
            if law is not None:
                trust = RELIABILITY[len(tail) - skipped - 1]
                return [
                    (token, trust * p, ((*tail[1 - LONGEST :], token), depth + 1)) for token, p in self._perturbed(law, depth)
                ]
        return ()

    def _perturbed(self, law: bytes, depth: int) -> list[tuple[int, float]]:
        """The law's tokens with their shares, after temperature and noise."""
        values = LAW.unpack(law)
        ids, odds = values[:TOP], values[TOP : 2 * TOP]
        params = self._seq.params
        sharpness = GREEDY_SHARPNESS if params.greedy else 1 / params.temperature
        shaped = [p**sharpness for p in odds]
        least = NEGLIGIBLE * sum(shaped)
        kept = [(token, p) for token, p in zip(ids, shaped, strict=True) if p > least]
        if not params.greedy:
            # exp(log p + g): what is proportional to it wins or loses as the perturbed scores do.
            kept = [(token, p * self._exp_gumbel(depth, token)) for token, p in kept]
        total = sum(p for _, p in kept)
        return [(token, p / total) for token, p in kept]

    def _exp_gumbel(self, depth: int, token: int) -> float:
        """exp(g) = 1 / -log U of the noise at a node's position, which its siblings share."""
        known = self._noise.get((depth, token))
        if known is None:
            seq = self._seq
            bits = word(seq.params.seed, seq.sample_index, seq.num_output + depth, token) >> 8
            known = self._noise[depth, token] = -1 / math.log((bits + 0.5) * 2.0**-24)
        return known


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row, float32. In numpy: a torch call for a few numbers may wake a thread for it."""
    with np.errstate(invalid="ignore"):
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares: np.ndarray = odds / odds.sum(axis=1, keepdims=True)
    return shares


def _generations(limit: int) -> Generations[Tail, bytes]:
    return Generations(limit, ENTRY_BYTES)


def _learn(laws: Generations[Tail, bytes], tail: Tail, new: bytes, shortest: int) -> None:
    """Average a row into the laws of the n-grams that its node ends, `shortest` tokens long and longer.

    A node that fell stands in a context that may never come: it teaches no single token, where averaging costs most.
    """
    for skipped in range(len(tail) - shortest + 1):
        gram = tail[skipped:]
        old = laws.find(gram)
        laws.put(gram, new if old is None else _merged(old, new))


def _merged(old: bytes, new: bytes) -> bytes:
    """(c P + P_new) / (c + 1), cut to the TOP likeliest. A row that was seen again under the same context adds nothing new."""
    if old[: 2 * TOP * 4] == new[: 2 * TOP * 4]:
        return old
    values, fresh = LAW.unpack(old), LAW.unpack(new)
    count = min(values[-1], 30.0)  # so that an old law can still change
    share = 1 / (count + 1)
    law = {token: p * count * share for token, p in zip(values[:TOP], values[TOP : 2 * TOP], strict=True)}
    for token, p in zip(fresh[:TOP], fresh[TOP : 2 * TOP], strict=True):
        law[token] = law.get(token, 0.0) + p * share
    best = sorted(law.items(), key=lambda item: -item[1])[:TOP]
    return LAW.pack(*(token for token, _ in best), *(p for _, p in best), count + 1)
