"""Where the last tokens of a text occurred before, in a set of texts that grow at their ends.

Hash chains, as compressors of the LZ77 kind keep them: for a few lengths n ("levels"), a dict from the hash of an n-gram to
the latest place right behind it, and beside every token a link to the place before that. A token costs O(1) whatever the size
of the texts, and a look follows a handful of links and compares backwards. A suffix tree would count all occurrences; this sees
the most recent ones, which is what fits in tens of microseconds of Python and some 250 bytes a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from typing import NamedTuple

LONGEST = 32  # tokens compared; longer matches count as this long
PLACE_BITS = 24
PLACE_MASK = (1 << PLACE_BITS) - 1
TEXT_BYTES = 400  # an empty text
MOST_BEGUN = 4  # texts remembered by one key
BEGUN_BYTES = 350
ENTRY_BYTES = 132  # a new n-gram: key, place and its share of the dict


class Occurrence(NamedTuple):
    """`length` tokens (at most LONGEST are told apart) right before text[at] equal the last ones; text[at] came next.

    Behind its end the text goes on with its last `wraps` tokens again, or not at all (0).
    """

    text: array[int]
    at: int
    length: int
    wraps: int = 0


class SuffixIndex:
    """Texts by number, and the places of their n-grams."""

    def __init__(self, levels: Seq[int]) -> None:
        """levels: the lengths n to look up, each at least 1. A match shorter than the smallest is not found."""
        self.levels = sorted(levels, reverse=True)
        self.num_bytes = 0
        self._texts: list[array[int]] = []
        self._links: list[list[array[int]]] = []  # of a text, by level: the place before the one at this token
        self._begun: dict[int, tuple[int, ...]] = {}
        self._heads: list[dict[int, int]] = [{} for _ in self.levels]

    def open(self, tokens: Seq[int] = (), key: int | None = None) -> int:
        """A new text; its number. `begun` finds what follows these first tokens by the key."""
        self._texts.append(array("i"))
        self._links.append([array("q") for _ in self.levels])
        self.num_bytes += TEXT_BYTES
        number = len(self._texts) - 1
        self.append(number, tokens)
        if key is not None:
            earlier = self._begun.get(key, ())
            self.num_bytes += 0 if earlier else BEGUN_BYTES
            self._begun[key] = (number << PLACE_BITS | len(tokens), *earlier[: MOST_BEGUN - 1])
        return number

    def begun(self, key: int, own: int = -1) -> list[Occurrence]:
        """The latest texts opened with this key, other than `own`, that have something behind what they were opened with."""
        found = []
        for place in self._begun.get(key, ()):
            number, at = place >> PLACE_BITS, place & PLACE_MASK
            if number != own and at < len(self._texts[number]):
                found.append(Occurrence(self._texts[number], at, LONGEST))
        return found

    def text(self, number: int) -> array[int]:
        return self._texts[number]

    def append(self, number: int, tokens: Seq[int]) -> None:
        """Continue a text. Raises IndexError for a number that is not open."""
        text = self._texts[number]
        first = len(text) + 1
        text.extend(tokens)
        new = 0
        for level, n in enumerate(self.levels):
            heads, links = self._heads[level], self._links[number][level]
            before = len(heads)
            for end in range(first, len(text) + 1):
                if end < n:
                    links.append(-1)
                    continue
                key = hash(tuple(text[end - n : end]))
                links.append(heads.get(key, -1))
                heads[key] = number << PLACE_BITS | end
            new += len(heads) - before
        self.num_bytes += (4 + 8 * len(self.levels)) * len(tokens) + ENTRY_BYTES * new

    def find(self, tail: array[int], most: int, own: int = -1) -> list[Occurrence]:
        """Up to `most` occurrences of the end of `tail`, each with something behind it, latest first.

        The longest level that occurs anywhere decides. `own` numbers the text that `tail` is the end of, if it is one of these:
        it has nothing behind its end, and for any other number occurrences in it count.
        """
        for level, n in enumerate(self.levels):
            if n > len(tail):
                continue
            found: list[Occurrence] = []
            place = self._heads[level].get(hash(tuple(tail[-n:])), -1)
            for _ in range(2 * most):
                if place < 0 or len(found) == most:
                    break
                number, at = place >> PLACE_BITS, place & PLACE_MASK
                text = self._texts[number]
                if at < len(text) and number != own:
                    length = common(text, at, tail)
                    if length >= n:  # else another n-gram of the same hash
                        found.append(Occurrence(text, at, length))
                place = self._links[number][level][at - 1]
            if found:
                return found
        return []


def common(text: array[int], at: int, tail: array[int]) -> int:
    """How many tokens right before text[at] equal the last of `tail`, up to LONGEST."""
    most = min(at, len(tail), LONGEST)
    if text[at - most : at] == tail[len(tail) - most :]:
        return most
    length, end = 0, len(tail)
    while text[at - 1 - length] == tail[end - 1 - length]:
        length += 1
    return length
