"""Drafter `prediction`: the client's own guess of the answer (the OpenAI `prediction` parameter), used as a draft.

A cursor runs through the predicted tokens. While the output follows them, the draft is what lies behind the cursor. After a
mismatch the last 8 to 2 output tokens are searched in the prediction, ahead of the cursor or a little behind it first, then
anywhere; if they are not there, one token is taken to have been replaced, and the cursor skips it. A place that proves
wrong at once costs a pause of 1, 2, 4, ... tokens.

It is never a constraint: what is wrong in it is rejected like any draft. It is not a search for one n-gram: it keeps its
place where a text repeats itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq

import numpy as np

from engine.protocols import NO_SIGNALS, Observed, Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

# Output tokens that must be found again. A shortest match of 2 takes 2 to 6% fewer steps than one of 3 where a variable was
# renamed or lines were inserted or deleted (80 HumanEval solutions, edited by script, budget 8); 1 gains little and errs more.
LONGEST, SHORTEST = 8, 2
WINDOW = 64  # predicted tokens behind the cursor that still count as near
PLACES = 32  # occurrences of one n-gram looked at
LONGEST_PAUSE = 32


class PredictionDrafter:
    name = "prediction"
    needs = NO_SIGNALS
    siblings = Siblings.POINT
    reports_prediction = True

    def __init__(self) -> None:
        self._cursors: dict[int, _Cursor] = {}

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        chains = [self._chain(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]
        forest = DraftForest.from_chains([seq.tokens[-1] for seq in seqs], chains, [self.name] * len(chains))
        if any(chains):
            confidence = [c for seq, chain in zip(seqs, chains, strict=True) for c in self._confidences(seq, len(chain))]
            forest.confidence = np.array(confidence, np.float32)
        return forest

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        """The committed tokens are all it learns from; `draft` reads them."""

    def forget(self, seq_id: int) -> None:
        self._cursors.pop(seq_id, None)

    def _confidences(self, seq: Sequence, length: int) -> list[float]:
        """Of the root and the nodes below it: each one that stands speaks for the place."""
        trust = self._cursors[seq.seq_id].trust if length else 0
        return [1.0, *(n / (n + 0.7) for n in range(trust, trust + length))]

    def _chain(self, seq: Sequence, budget: int) -> list[int]:
        if not seq.request.prediction_ids or budget < 1:
            return []
        cursor = self._cursors.get(seq.seq_id)
        if cursor is None:
            cursor = self._cursors[seq.seq_id] = _Cursor(seq.request.prediction_ids, seq.num_prompt)
        return cursor.guess(seq.tokens, budget)


class _Cursor:
    """A place in the prediction, moved one output token at a time: the same place however the tokens were committed."""

    def __init__(self, prediction: list[int], num_prompt: int) -> None:
        self._prediction = prediction
        self._num_prompt = num_prompt
        self._read = num_prompt  # committed tokens taken in
        self._at = 0  # the predicted token that should come next
        self._aligned = True
        self.trust = LONGEST  # tokens in a row that speak for the place
        self._held = LONGEST  # those of them that came after the place was chosen
        self._pause = 0
        self._next_pause = 1
        self._places: dict[tuple[int, ...], list[int]] = {}
        for end in range(SHORTEST, len(prediction) + 1):
            self._places.setdefault(tuple(prediction[end - SHORTEST : end]), []).append(end)

    def guess(self, tokens: list[int], budget: int) -> list[int]:
        """What the prediction says comes after `tokens`; a young place is trusted for twice what speaks for it."""
        for end in range(self._read + 1, len(tokens) + 1):
            self._step(tokens, end)
        self._read = len(tokens)
        if not self._aligned:
            return []
        length = budget if self.trust >= LONGEST else min(budget, 2 * self.trust - 1)
        return self._prediction[self._at : self._at + length]

    def _step(self, tokens: list[int], end: int) -> None:
        """Take in tokens[end - 1]."""
        if self._aligned and self._prediction[self._at : self._at + 1] == tokens[end - 1 : end]:
            self._settle(self._at + 1, self.trust + 1, self._held + 1)
            if self._held >= LONGEST:
                self._next_pause = 1
            return
        replaced = self._aligned and self.trust >= LONGEST
        if self._aligned and self._held == 0:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, LONGEST_PAUSE)
        self._aligned = False
        if self._pause:
            self._pause -= 1
            return
        place, matched = self._find(tokens, end)
        if matched:
            self._settle(place, matched)
        elif replaced:
            # Most often one token was replaced, as in a renamed variable: go on behind it, with little trust.
            self._settle(self._at + 1, 1)

    def _settle(self, place: int, trust: int, held: int = 0) -> None:
        self._at, self.trust, self._held, self._aligned = place, trust, held, True

    def _find(self, tokens: list[int], end: int) -> tuple[int, int]:
        """The place right behind the longest match of the last output tokens, the nearest of several; (0, 0) if there is none."""
        if end - self._num_prompt < SHORTEST:
            return 0, 0
        places = self._places.get(tuple(tokens[end - SHORTEST : end]), [])
        near = bisect_left(places, self._at - WINDOW)
        for group in (places[near : near + PLACES], places[max(0, near - PLACES) : near]):
            if group:
                matched, _, place = max((self._matched(tokens, end, place), -abs(place - self._at), place) for place in group)
                return place, matched
        return 0, 0

    def _matched(self, tokens: list[int], end: int, place: int) -> int:
        most = min(LONGEST, place, end - self._num_prompt)
        length = SHORTEST
        while length < most and self._prediction[place - 1 - length] == tokens[end - 1 - length]:
            length += 1
        return length
