"""How much of the texts that a drafter reads is read in one step, so that the first look at a long prompt stalls nobody.

A prompt read in one go cost its step 28 ms (ngram), 132 ms (suffix) and 267 ms (aded) of CPU time at 131,072 tokens, several
times as much on a busy machine, where a drafter that takes a second is benched for everybody. A portion costs 0.5, 2.3 and 4 ms.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from engine.sequence import Sequence

PORTION = 2048  # tokens of one step, all sequences together
NEAR = 64  # who is no further behind is always read to the end, so that company changes no draft of a running sequence


class Text(Protocol):
    """What a drafter keeps of one sequence's text."""

    @property
    def num_read(self) -> int:
        """Leading tokens that have been taken in."""
        ...

    def read(self, tokens: list[int], end: int) -> None:
        """Take in tokens[num_read:end]."""
        ...


def read_on(pairs: Iterable[tuple[Text, Sequence]]) -> None:
    """Bring texts up to their sequences, in their order, or nearer by a portion that the shortest backlogs share first."""
    pairs = list(pairs)
    for (text, seq), share in zip(pairs, _shares([seq.num_tokens - text.num_read for text, seq in pairs]), strict=True):
        if share:
            text.read(seq.tokens, text.num_read + share)


def is_read(text: Text, seq: Sequence) -> bool:
    """Whether the text is all of the sequence."""
    return text.num_read >= seq.num_tokens


def _shares(backlogs: list[int]) -> list[int]:
    left = PORTION
    shares = list(backlogs)
    for i in sorted(range(len(backlogs)), key=backlogs.__getitem__):
        if backlogs[i] > NEAR:
            shares[i] = min(backlogs[i], left)
            left -= shares[i]
    return shares
