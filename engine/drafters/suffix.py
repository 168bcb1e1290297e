"""Drafter `suffix`: what followed the longest match of the last tokens, here or in earlier answers, follows again.

SuffixDecoding (Oliaro et al., "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications", arXiv 2411.04975).
Two places are searched: the sequence's own text (prompt and output), and the outputs of all sequences of the same salt, past
and running, each behind the last tokens of its prompt; a prompt asked again word for word finds its answers before their first
token. While a long prompt is still being read only the second is searched. The continuations of the matches form a trie. A
node's confidence is the share of its parent's matches that go its way (a match longer by a token counts twice) times how often
a match of that length proved right. The nodes with the likeliest paths are drafted: a chain where the matches agree, a tree
where they do not.

It is not the paper's suffix tree: hash chains (engine/suffix_index.py) see the latest occurrences only, and the paper's
count ratio and its limit of a draft to a multiple of the match are one number here.

Replayed on SmolLM2-135M's answers to 26 of our prompts (26 greedy, 52 at T = 0.7, 96 tokens at most; `bench.replay`),
starting from nothing, tokens per step / drafted per step / accepted:

    budget  least   greedy             T = 0.7            greedy, asked again
       8    0.02    2.14  4.6  25%     1.75  4.3  17%      8.13   7.6  94%
       8    0.05    2.05  3.3  32%     1.69  3.0  23%      8.13   7.6  94%
       8    0.1     1.99  2.2  45%     1.62  2.0  31%      8.13   7.6  94%
      32    0.05    2.19  4.9  24%     1.74  4.8  15%     23.1   27.5  80%
       8    (ngram) 1.90  1.7  53%     1.49  1.3  38%      1.90   1.7  53%

Nothing else matters as much: 4 or 16 matches, growth 1.5 or 4, other levels move tokens per step by less than 2%, but own matches
must begin at one token (at two: 1.94 greedy, 1.57 sampled). A draft takes 35 us, 65 to 140 us for long ones, learning 5 us.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from collections.abc import Sequence as Seq

from engine.growth import NO_BRANCHES, Branches, forest_of, grow
from engine.protocols import NO_SIGNALS, Observed, Siblings
from engine.reading import is_read, read_on
from engine.sequence import Sequence
from engine.shared_state import SaltedStore
from engine.suffix_index import LONGEST, Occurrence, SuffixIndex
from engine.tree import DraftForest, Verdict

OWN_LEVELS = (1, 4)
SHARED_LEVELS = (3, 12)
NEGLIGIBLE = 0.01
# How often the continuation of a match of 1, 2, 3, ... tokens proved right where all matches agreed (same recording, greedy and
# T = 0.7 alike up to 8 tokens; from 12 on 0.98 and 0.89), and what is left of that where they did not.
RELIABILITY = [0.33, 0.58, 0.71, 0.74, 0.78, 0.85, 0.85, 0.87, 0.88, 0.9, 0.92, *(0.94 + 0.002 * i for i in range(21))]
DISAGREEMENT = 0.6

# Occurrences that a node of the trie stands for, with their weights; how many tokens it lies below the root; the longest match.
State = tuple[list[tuple[Occurrence, float]], int, int]


class SuffixDrafter:
    """matches: occurrences looked at in each place; least: nodes whose path is less likely than this are not drafted;
    growth: a match longer by one token counts so many times as much. ValueError for numbers that make no sense."""

    name = "suffix"
    needs = NO_SIGNALS
    siblings = Siblings.POINT

    def __init__(self, memory_bytes: int = 64 << 20, matches: int = 8, least: float = 0.05, growth: float = 2.0) -> None:
        if matches < 1 or not 0 <= least <= 1 or growth < 1:
            raise ValueError(f"suffix needs matches >= 1, 0 <= least <= 1 and growth >= 1, not {matches}, {least} and {growth}")
        self.matches, self.least = matches, least
        # By how many tokens shorter than the longest match it is; less than a hundredth does not count.
        self._weights = [growth**-i for i in range(LONGEST + 1) if growth**-i > NEGLIGIBLE]
        self._memory: SaltedStore[_Memory] = SaltedStore(_Memory, memory_bytes)
        self._readers: dict[int, _Reader] = {}

    @property
    def num_bytes(self) -> int:
        """Of what outlives the sequences."""
        return self._memory.num_bytes

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        self.read([seq for seq, budget in zip(seqs, budgets, strict=True) if budget > 0])
        trees = [self._tree(seq, budget) if budget > 0 else NO_BRANCHES for seq, budget in zip(seqs, budgets, strict=True)]
        return forest_of([seq.tokens[-1] for seq in seqs], trees, self.name)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """Learn the output up to now; this step's own tokens are learned when they have been committed."""
        for seq in seqs:
            self._learn(self._reader(seq))

    def read(self, seqs: Seq[Sequence]) -> None:
        read_on((self._reader(seq), seq) for seq in seqs)

    def forget(self, seq_id: int) -> None:
        reader = self._readers.pop(seq_id, None)
        if reader is not None and reader.seq.num_output:
            self._learn(reader)  # what the last step committed

    def _reader(self, seq: Sequence) -> _Reader:
        reader = self._readers.get(seq.seq_id)
        if reader is None:
            reader = self._readers[seq.seq_id] = _Reader(seq)
        return reader

    def _learn(self, reader: _Reader) -> None:
        salt = reader.seq.request.cache_salt
        if reader.learn(self._memory.get(salt)):
            self._memory.settle(salt)

    def _tree(self, seq: Sequence, budget: int) -> Branches:
        reader = self._reader(seq)
        self._learn(reader)
        found = reader.find(self._memory.get(seq.request.cache_salt), self.matches)
        if not found:
            return NO_BRANCHES
        longest = max(occurrence.length for occurrence in found)
        lost = len(self._weights)  # tokens by which a match is too much shorter to count
        weighted = [(o, self._weights[longest - o.length]) for o in found if longest - o.length < lost]
        return grow((weighted, 0, longest), self._children, budget, self.least)

    def _children(self, state: State) -> Iterable[tuple[int, float, State]]:
        occurrences, depth, longest = state
        reliability = RELIABILITY[min(longest + depth, len(RELIABILITY)) - 1]
        groups: dict[int, list[tuple[Occurrence, float]]] = {}
        for pair in occurrences:
            text, at, _, wraps = pair[0]
            at += depth
            if at >= len(text):
                if not wraps:
                    continue
                at = len(text) - wraps + (at - len(text)) % wraps
            token = text[at]
            if token in groups:
                groups[token].append(pair)
            else:
                groups[token] = [pair]
        if len(groups) == 1:
            ((token, group),) = groups.items()
            return ((token, reliability, (group, depth + 1, longest)),)
        shares = {token: sum([weight for _, weight in group]) for token, group in groups.items()}
        reliability *= DISAGREEMENT / (sum(shares.values()) or 1)
        return [
            (token, reliability * shares[token], (group, depth + 1, max([occurrence.length for occurrence, _ in group])))
            for token, group in groups.items()
        ]


class _Memory:
    """The outputs of one salt, in two generations."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.young, self.old = SuffixIndex(SHARED_LEVELS), SuffixIndex(SHARED_LEVELS)

    @property
    def num_bytes(self) -> int:
        return self.young.num_bytes + self.old.num_bytes

    def make_room(self) -> None:
        if 2 * self.young.num_bytes > self.limit:
            self.old, self.young = self.young, SuffixIndex(SHARED_LEVELS)


class _Reader:
    """One sequence's place in its own text and in the memory."""

    def __init__(self, seq: Sequence) -> None:
        self.seq = seq
        self._own = SuffixIndex(OWN_LEVELS)
        self._own.open()
        self._text = self._own.text(0)
        self._prompt = hash(tuple(seq.tokens[: seq.num_prompt]))
        self._learned = 0  # tokens after which `learn` was last called
        self._written: SuffixIndex | None = None  # where the output goes, and as which text
        self._number = -1
        self._followed: list[Occurrence] = []  # shared occurrences that the last draft knew, as long as they hold

    @property
    def num_read(self) -> int:
        return len(self._text)

    def read(self, tokens: list[int], end: int) -> None:
        """Into the own text."""
        self._own.append(0, tokens[self.num_read : end])

    def learn(self, memory: _Memory) -> bool:
        """Write the output committed since the last time to the memory; True if there may be any."""
        tokens = self.seq.tokens
        if len(tokens) == self._learned:
            return False
        output = tokens[max(self._learned, self.seq.num_prompt) :]
        self._followed = _advanced(self._followed, array("i", output))
        memory.make_room()
        if self._written is not memory.young:
            before = tokens[max(0, len(tokens) - len(output) - LONGEST) : len(tokens) - len(output)]
            self._number = memory.young.open(before, self._prompt if self._written is None else None)
            self._written = memory.young
        memory.young.append(self._number, output)
        self._learned = len(tokens)
        return True

    def find(self, memory: _Memory, most: int) -> list[Occurrence]:
        """Occurrences of the end of the text, each place once."""
        shared = self._followed
        if self.seq.num_output == 0:
            shared = memory.young.begun(self._prompt, self._number) or memory.old.begun(self._prompt, -1)
        if len(shared) < most:
            known = {(id(o.text), o.at) for o in shared}
            number = self._number if self._written is memory.young else -1
            tail = array("i", self.seq.tokens[-LONGEST:])
            fresh = memory.young.find(tail, most, number) or memory.old.find(tail, most)
            shared = (shared + [o for o in fresh if (id(o.text), o.at) not in known])[:most]
        self._followed = shared
        if not is_read(self, self.seq):
            return shared
        own = self._own.find(self._text, most)
        size = len(self._text)
        # A continuation that runs into the end of the own text goes on with itself.
        return [Occurrence(text, at, length, size - at) for text, at, length, _ in own] + shared


def _advanced(occurrences: list[Occurrence], new: array[int]) -> list[Occurrence]:
    """Those of the occurrences that go on with the new tokens."""
    count = len(new)
    return [
        Occurrence(text, at + count, min(length + count, LONGEST))
        for text, at, length, _ in occurrences
        if text[at : at + count] == new
    ]
