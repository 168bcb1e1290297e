"""Drafter `rasd`: what followed this context in the operator's datastore and in the sequence's own text, in one tree.

After RASD: Retrieval-Augmented Speculative Decoding (arXiv 2503.03434, ACL Findings 2025). From the paper: a retrieval tree
is pruned by what a model expects of its first tokens, then merged with another drafter's tree by longest common prefixes.
Not from the paper, which runs a draft model: here the other tree is prompt lookup in the sequence's own text, and the model that
prunes is the target itself, as far as it is known: behind the last two tokens it was seen to prefer `top_k` tokens (the k
likeliest of every judged node are kept, by pair of tokens), and a continuation from the datastore that begins with another one is
left out. Where that pair was never judged nothing is pruned. Fusing with a model's tree is the engine's (engine/fusion.py):
configure both. The paper's thresholds are unknown to us; all numbers here are our own.

Pruning is off unless `top_k` is given: on recorded answers of SmolLM2-135M it dropped four of five continuations wherever the
pair was known (every third step) and changed tokens per step by less than 0.5%, because the tree is filled by share anyway,
while the k likeliest of nine rows take 0.3 ms of a step.

A continuation weighs as many as its context's tokens matched; of each source at most `few` of them count, so that a thousand
occurrences of two tokens do not outweigh one of sixteen. What is learned of the target is kept by cache salt, bounded in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import pairwise
from pathlib import Path

import numpy as np

from engine.continuations import Ids, Weights, most_frequent
from engine.datastore import Datastore
from engine.growth import NO_BRANCHES, Branches, forest_of
from engine.protocols import Observed, Siblings, Signals
from engine.reading import is_read, read_on
from engine.sequence import Sequence
from engine.shared_state import Generations, SaltedStore
from engine.tree import DraftForest, Verdict

Pair = tuple[int, int]
Preferred = Generations[Pair, tuple[int, ...]]

OWN_PLACES = 32  # earlier occurrences in the own text looked at
PREFERRED_BYTES = 500  # a pair and eight ids, with their places in a dict


class RasdDrafter:
    """datastore: a file that `outrider datastore build` wrote. longest, shortest: tokens of context that match; depth: tokens
    continued; matches: occurrences looked at in the datastore; doubt: see `rest`; floor: what stands with less is left out.

    Raises ValueError, one line fit for the operator, for a datastore that is missing, broken or built for another vocabulary,
    and for numbers that make no sense; OSError for one that cannot be read.
    """

    name = "rasd"
    siblings = Siblings.POINT

    def __init__(
        self,
        datastore: str | Path | Datastore | None = None,
        vocab_size: int | None = None,
        memory_bytes: int = 64 << 20,
        *,
        longest: int = 16,
        shortest: int = 1,
        depth: int = 10,
        matches: int = 128,
        few: int = 4,
        doubt: float = 3.0,
        floor: float = 0.05,
        top_k: int = 0,
    ) -> None:
        if datastore is None:
            raise ValueError("drafter rasd needs a datastore (--datastore FILE; outrider datastore build makes one)")
        if not 1 <= shortest <= longest or depth < 1 or matches < 1 or few < 1 or doubt < 0 or top_k < 0:
            raise ValueError("rasd needs 1 <= shortest <= longest, depth, matches, few >= 1 and doubt, top_k >= 0")
        self.datastore = datastore if isinstance(datastore, Datastore) else Datastore(datastore, vocab_size)
        self.longest, self.shortest, self.depth, self.matches = longest, shortest, depth, matches
        self.few, self.doubt, self.floor = few, doubt, floor
        self.needs = Signals(top_k=top_k)
        self._preferred: SaltedStore[Preferred] = SaltedStore(lambda limit: Generations(limit, PREFERRED_BYTES), memory_bytes)
        self._own: dict[int, _OwnText] = {}

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        self.read([seq for seq, budget in zip(seqs, budgets, strict=True) if budget > 0])
        branches = [self._branches(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        return forest_of([seq.tokens[-1] for seq in seqs], branches, self.name)

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """Keep which tokens the target preferred behind each judged node and its parent."""
        if signals.top_ids is None or not self.needs.top_k:
            return
        preferred = signals.top_ids[:, : self.needs.top_k].tolist()
        tokens, parents, starts = forest.token.tolist(), forest.parent.tolist(), forest.start.tolist()
        for seq, (first, last) in zip(seqs, pairwise(starts), strict=True):
            salt = seq.request.cache_salt
            kept = self._preferred.get(salt)
            for row in range(first, last):
                before = tokens[first + parents[row]] if row > first else (seq.tokens[-2] if seq.num_tokens > 1 else -1)
                kept.put((before, tokens[row]), tuple(preferred[row]))
            self._preferred.settle(salt)

    def read(self, seqs: Seq[Sequence]) -> None:
        for seq in seqs:
            if seq.seq_id not in self._own:
                self._own[seq.seq_id] = _OwnText(self.shortest)
        read_on((self._own[seq.seq_id], seq) for seq in seqs)

    def forget(self, seq_id: int) -> None:
        self._own.pop(seq_id, None)

    def _branches(self, seq: Sequence, budget: int) -> Branches:
        if budget < 1:
            return NO_BRANCHES
        sources = [source for source in (self._retrieved(seq), self._repeated(seq)) if len(source[0])]
        if not sources:
            return NO_BRANCHES
        rows = np.concatenate([rows for rows, _ in sources])
        weights = np.concatenate([weights for _, weights in sources])
        return most_frequent(rows, budget, weights=weights, doubt=self.doubt, floor=self.floor)

    def _retrieved(self, seq: Sequence) -> tuple[Ids, Weights]:
        """What the datastore has, less what the target would not begin with."""
        found = self.datastore.find(seq.tokens, self.longest, self.shortest)
        rows = self.datastore.continuations(found, self.depth, self.matches)
        kept = self._preferred.find(seq.request.cache_salt)
        preferred = kept.find((seq.tokens[-2], seq.tokens[-1])) if kept is not None and seq.num_tokens > 1 else None
        if preferred is not None:
            rows = rows[np.isin(rows[:, 0], preferred)]
        return rows, self._weigh(len(rows), found.length)

    def _repeated(self, seq: Sequence) -> tuple[Ids, Weights]:
        """What the sequence's own text has, once it is read."""
        own = self._own[seq.seq_id]
        places, matched = own.find(seq.tokens, self.longest) if is_read(own, seq) else ([], 0)
        rows = np.full((len(places), self.depth), -1, np.int32)
        for row, place in zip(rows, places, strict=True):
            after = seq.tokens[place : place + self.depth]
            row[: len(after)] = after
        return rows, self._weigh(len(rows), matched)

    def _weigh(self, count: int, matched: int) -> Weights:
        return np.full(count, matched * min(count, self.few) / max(count, 1), np.float32)


class _OwnText:
    """Where each n-gram of one text ended before; reads every token once."""

    def __init__(self, n: int) -> None:
        self._n = n
        self.num_read = n  # what is shorter has no n-gram with something behind it
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def read(self, tokens: list[int], end: int) -> None:
        n = self._n
        for place in range(self.num_read, end):  # the n-gram at the very end is what is looked up
            self._ends.setdefault(tuple(tokens[place - n : place]), []).append(place)
        self.num_read = max(self.num_read, end)

    def find(self, tokens: list[int], longest: int) -> tuple[list[int], int]:
        """The places behind the earlier occurrences that share the most last tokens, up to `longest`, and how many they share."""
        n = self._n
        best: list[int] = []
        most = 0
        for end in reversed(self._ends.get(tuple(tokens[-n:]), [])[-OWN_PLACES:]):
            matched = n
            while matched < min(longest, end) and tokens[end - 1 - matched] == tokens[-1 - matched]:
                matched += 1
            if matched > most:
                best, most = [], matched
            if matched == most:
                best.append(end)
        return best, most
