"""Where the end of a text occurred before: the same places as a plain search, the latest first, whatever was appended how."""

from __future__ import annotations

import random
import tracemalloc
from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.suffix_index import LONGEST, SuffixIndex, common

LEVELS = (2, 4)


def by_search(texts: list[list[int]], tail: list[int], own: int) -> set[tuple[int, int, int]]:
    """(text, place, length) of all occurrences of the longest level of the tail's end that has any."""
    for n in sorted(LEVELS, reverse=True):
        found = set()
        for number, text in enumerate(texts):
            for at in range(n, len(text)):
                length = 0
                while length < min(at, len(tail), LONGEST) and text[at - 1 - length] == tail[-1 - length]:
                    length += 1
                if length >= n and number != own:
                    found.add((number, at, length))
        if found and len(tail) >= n:
            return found
    return set()


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), max_size=9)), max_size=14))
def test_it_finds_what_a_search_finds(pieces: list[tuple[int, list[int]]]) -> None:
    index = SuffixIndex(LEVELS)
    texts: list[list[int]] = [[], [], []]
    assert [index.open() for _ in texts] == [0, 1, 2]
    for number, piece in pieces:
        index.append(number, piece)
        texts[number] += piece
    for number, text in enumerate(texts):
        assert list(index.text(number)) == text
        for own in (-1, number):
            found = index.find(index.text(number), 1000, own)
            # In its own text the tail occurs at its very end, with nothing behind it.
            numbers = {id(index.text(n)): n for n in range(3)}
            assert {(numbers[id(o.text)], o.at, o.length) for o in found} == by_search(texts, text, own)


def test_of_many_occurrences_the_latest_are_seen() -> None:
    index = SuffixIndex(LEVELS)
    number = index.open([token for i in range(50) for token in (1, 2, 10 + i)] + [1, 2])
    found = index.find(index.text(number), 3)
    assert [o.text[o.at] for o in found] == [59, 58, 57]


def test_a_match_is_compared_up_to_the_longest() -> None:
    text = array("i", range(100))
    assert common(text, 80, array("i", range(20, 80))) == LONGEST
    assert common(text, 80, array("i", [7, *range(70, 80)])) == 10
    assert common(text, 3, array("i", range(3))) == 3
    assert common(text, 3, array("i", [9])) == 0


def test_texts_are_found_by_the_key_they_were_opened_with() -> None:
    index = SuffixIndex(LEVELS)
    first, second = index.open([1, 2], 77), index.open([1, 2], 77)
    assert index.begun(77) == []  # nothing behind the prompts yet
    index.append(first, [5])
    index.append(second, [6, 7])
    assert [o.text[o.at] for o in index.begun(77)] == [6, 5]
    assert [o.text[o.at] for o in index.begun(77, own=second)] == [5]
    assert index.begun(78) == []


def test_tokens_are_charged_what_they_take() -> None:
    rng = random.Random(0)
    for vocabulary in (50, 50_000):
        tracemalloc.start()
        index = SuffixIndex((3, 12))
        for number in range(300):
            index.open([rng.randrange(vocabulary) for _ in range(32)], number)
            index.append(number, [rng.randrange(vocabulary) for _ in range(100)])
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert 0.4 * index.num_bytes < taken < 1.05 * index.num_bytes, vocabulary
