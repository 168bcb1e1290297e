"""Drafter `aded`: which token followed these two, and how lately, per salt; a tree of the likeliest continuations.

ADED / Adaptix, "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (Liu et al., arXiv 2407.12021). A map of
pairs of tokens with weighted successors (at most 12) answers with the draft tree; what was committed lately weighs more. The
map here has no corpus to begin with: it learns prompts and outputs as they are committed. A successor seen again gains 1 and
the others fade, which is the paper's boost of recent tri-grams (+0.04 a step for those in the last 16 tokens, at most 3) with a
scale of its own.

What differs further: the paper finds its tree by Monte Carlo tree search (150 rollouts). The value that estimates is the
probability of a path, which is known here, so the tree is grown best first (engine/growth.py): the same set, in microseconds.
It never looks further back than two tokens; it asks the target for nothing.

Replayed on SmolLM2-135M's answers to 26 of our prompts (26 greedy, 52 at T = 0.7, 96 tokens at most; `bench.replay`), budget
8, starting from nothing, tokens per step / drafted per step / accepted:

    doubt  least    greedy             T = 0.7            greedy, asked again
     0.7    0.1     1.81  2.4  34%     1.59  2.6  23%     3.78  6.3  44%
     0.4    0.05    1.89  3.2  28%     1.60  3.1  20%     4.05  7.6  40%
     1.5    0.1     1.67  1.6  42%     1.54  1.8  29%     3.21  4.3  51%

fade 0.5 to 0.9 changes nothing that could be told from chance. A draft takes 15 to 30 us, learning 5 us a step.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

from engine.growth import NO_BRANCHES, Branches, forest_of, grow
from engine.protocols import NO_SIGNALS, Observed, Siblings
from engine.reading import read_on
from engine.sequence import Sequence
from engine.shared_state import Generations, SaltedStore
from engine.tree import DraftForest, Verdict

MOST_SUCCESSORS = 12
MOST_WEIGHT = 6.0
ENTRY_BYTES = 430  # a pair with one successor and its share of the dict
SUCCESSOR_BYTES = 100  # every further one

Pair = tuple[int, int]
Successors = dict[int, float]


class AdedDrafter:
    """fade: what a pair's other successors keep of their weight when one is seen; doubt: the weight of whatever was not seen;
    least: nodes whose path is less likely are not drafted. ValueError for numbers that make no sense."""

    name = "aded"
    needs = NO_SIGNALS
    siblings = Siblings.POINT

    def __init__(self, memory_bytes: int = 64 << 20, fade: float = 0.7, doubt: float = 0.4, least: float = 0.05) -> None:
        if not (0 <= fade <= 1 and doubt >= 0 and 0 <= least <= 1):
            raise ValueError(f"aded needs 0 <= fade <= 1, doubt >= 0 and 0 <= least <= 1, not {fade}, {doubt} and {least}")
        self.fade, self.doubt, self.least = fade, doubt, least
        self._maps: SaltedStore[Generations[int, Successors]] = SaltedStore(_generations, memory_bytes)
        self._lessons: dict[int, _Lesson] = {}  # by sequence

    @property
    def num_bytes(self) -> int:
        """Of what outlives the sequences."""
        return self._maps.num_bytes

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        self.read([seq for seq, budget in zip(seqs, budgets, strict=True) if budget > 0])
        trees = [self._tree(seq, budget) if budget > 0 else NO_BRANCHES for seq, budget in zip(seqs, budgets, strict=True)]
        return forest_of([seq.tokens[-1] for seq in seqs], trees, self.name)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """Take in what was committed up to now; this step's own tokens are learned when they have been."""
        self.read(seqs)

    def read(self, seqs: Seq[Sequence]) -> None:
        for seq in seqs:
            if seq.seq_id not in self._lessons:
                self._lessons[seq.seq_id] = _Lesson(seq, self._maps, self.fade)
        read_on((self._lessons[seq.seq_id], seq) for seq in seqs)

    def forget(self, seq_id: int) -> None:
        lesson = self._lessons.pop(seq_id, None)
        if lesson is not None:
            read_on([(lesson, lesson.seq)])  # what the last step committed

    def _tree(self, seq: Sequence, budget: int) -> Branches:
        if seq.num_tokens < 2:
            return NO_BRANCHES
        map_ = self._maps.get(seq.request.cache_salt)
        doubt = self.doubt

        def children(pair: Pair) -> Iterable[tuple[int, float, Pair]]:
            successors = map_.find(_key(*pair))
            if successors is None:
                return ()
            total = sum(successors.values()) + doubt
            return [(token, weight / total, (pair[1], token)) for token, weight in successors.items()]

        return grow((seq.tokens[-2], seq.tokens[-1]), children, budget, self.least)


class _Lesson:
    """What one sequence teaches the map of its salt, in the order of its text."""

    def __init__(self, seq: Sequence, maps: SaltedStore[Generations[int, Successors]], fade: float) -> None:
        self.seq, self.num_read = seq, 0
        self._maps, self._fade = maps, fade

    def read(self, tokens: list[int], end: int) -> None:
        salt = self.seq.request.cache_salt
        map_ = self._maps.get(salt)
        for place in range(max(2, self.num_read), end):
            key = _key(tokens[place - 2], tokens[place - 1])
            successors = map_.find(key) or {}
            known = len(successors)
            self._boost(successors, tokens[place])
            if map_.put(key, successors):
                known = 1
            map_.charge(SUCCESSOR_BYTES * (len(successors) - known))
        self.num_read = end
        self._maps.settle(salt)

    def _boost(self, successors: Successors, token: int) -> None:
        for other in successors:
            if other != token:
                successors[other] *= self._fade
        successors[token] = min(successors.get(token, 0.0) + 1, MOST_WEIGHT)
        if len(successors) > MOST_SUCCESSORS:
            del successors[min(successors, key=lambda other: successors[other])]


def _generations(limit: int) -> Generations[int, Successors]:
    return Generations(limit, ENTRY_BYTES)


def _key(before: int, token: int) -> int:
    return before << 32 | token
