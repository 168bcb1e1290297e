"""Tokens of one growing answer -> text that is safe to show, and stop strings. One `Detokenizer` per choice.

Tokens are bytes: text is decoded as soon as its bytes decide it, so a character split over tokens is never shown half.
Stop strings are matched character by character (Knuth, Morris, Pratt), so neither the tokens' borders nor how tokens
were grouped into pushes change what is found, and the work per character is constant.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import NamedTuple

from server.tokenizer import Tokenizer


class Piece(NamedTuple):
    text: str  # new text, safe to show
    num_tokens: int  # tokens of this push that belong to the answer: up to the one that completed a stop string
    stopped: str | None  # the stop string that ended the answer


class _Stop:
    """One stop string and how much of it the text ends with."""

    __slots__ = ("borders", "matched", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self.borders = [0] * len(text)  # borders[i]: longest proper prefix of text[:i+1] that is also its suffix
        k = 0
        for i in range(1, len(text)):
            while k and text[i] != text[k]:
                k = self.borders[k - 1]
            k += text[i] == text[k]
            self.borders[i] = k

    def feed(self, char: str) -> bool:
        """Take one character; True when the text now ends with the whole stop string."""
        k = self.matched
        while k and char != self.text[k]:
            k = self.borders[k - 1]
        k += char == self.text[k]
        self.matched = k
        return k == len(self.text)


class Detokenizer:
    """Text that may be the start of a stop string, or of a character, is held back until it is decided or `final`.

    Of stop strings that end at the same character the longest counts; else the one that is complete first. A leading
    space stays: an answer continues its prompt ("Once upon" + " a time"), whatever a decoder does to whole texts.
    Text of the first `min_tokens` tokens is no part of a stop string.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._hidden = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._stops = [_Stop(text) for text in sorted(set(stop), key=len, reverse=True) if text]
        self._include_stop = include_stop
        self._immune = min_tokens  # tokens still to come that cannot stop the answer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, not yet shown
        self._stopped: str | None = None

    def push(self, token_ids: Sequence[int], final: bool = False) -> Piece:
        """Take the next tokens. With `final` everything held is shown, an unfinished character as U+FFFD.

        After a stop string has matched, further pushes give nothing.
        """
        if self._stopped is not None:
            return Piece("", 0, self._stopped)
        for count, token_id in enumerate(token_ids, start=1):
            text = self._decoder.decode(self._token_bytes(token_id)) if token_id not in self._hidden else ""
            if self._take(text):
                return Piece(self._release(), count, self._stopped)
            self._immune -= 1
        if final:
            self._take(self._decoder.decode(b"", True))
            return Piece(self._release(), len(token_ids), self._stopped)
        return Piece(self._release(self._undecided()), len(token_ids), None)

    def _take(self, text: str) -> bool:
        """Add decoded text up to and including the first complete stop string; True when there was one."""
        if not self._stops or self._immune > 0:
            self._held += text
            return False
        for i, char in enumerate(text, start=1):
            done = [stop for stop in self._stops if stop.feed(char)]
            if done:
                self._stopped = done[0].text  # the longest: they are sorted
                self._held += text[:i]
                if not self._include_stop:
                    self._held = self._held[: -len(self._stopped)]
                return True
        self._held += text
        return False

    def _undecided(self) -> int:
        """Characters at the end that a stop string may still claim."""
        return max((stop.matched for stop in self._stops), default=0)

    def _release(self, keep: int = 0) -> str:
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text
