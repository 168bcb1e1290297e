"""Detokenizer: what is shown, when, and where an answer ends. The reference is the whole text, taken at once."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.detokenizer import Detokenizer, Piece
from server.tokenizer import Tokenizer


class Bytes:
    """A tokenizer for tests: ids 0-255 are bytes, 256 is special, from 300 on the given pieces."""

    special_ids = frozenset({256})

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        if token_id == 256:
            return b"<end>"
        return bytes([token_id]) if token_id < 256 else self.pieces[token_id - 300]


def detokenizer(*pieces: bytes, **options: object) -> Detokenizer:
    return Detokenizer(Bytes(*pieces), **options)  # type: ignore[arg-type]


def run(detok: Detokenizer, pushes: Sequence[Sequence[int]]) -> tuple[str, int, str | None]:
    """All text, all tokens and the stop string of an answer pushed in these groups."""
    got = [detok.push(list(ids), final=i == len(pushes) - 1) for i, ids in enumerate(pushes)]
    return "".join(p.text for p in got), sum(p.num_tokens for p in got), next((p.stopped for p in got if p.stopped), None)


def reference(
    ids: Sequence[int], pieces: Sequence[bytes], stop: Sequence[str], include: bool, skip: bool
) -> tuple[str, int, str | None]:
    """The same by brute force: after every token decode everything anew and look for stop strings in every prefix."""
    tokenizer = Bytes(*pieces)
    raw = [b"" if skip and i in tokenizer.special_ids else tokenizer.token_bytes(i) for i in ids]
    for count in range(1, len(ids) + 1):
        whole = b"".join(raw[:count]).decode("utf-8", "replace")
        # Text that the next bytes cannot change: all of it at the end of the answer, else what an incremental decoder gives.
        settled = whole if count == len(ids) else codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(raw[:count]))
        for end in range(len(settled) + 1):
            found = [s for s in stop if s and settled[:end].endswith(s)]
            if found:
                longest = max(found, key=len)
                return settled[: end if include else end - len(longest)], count, longest
    return b"".join(raw).decode("utf-8", "replace"), len(ids), None


PIECES = (b"ab", b"abab", "é".encode(), "é".encode()[:1], "😀".encode()[2:], b"\n\n", b" the", b"")
IDS = st.lists(
    st.sampled_from([97, 98, 99, 10, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80, 256, *range(300, 300 + len(PIECES))]), max_size=16
)
STOPS = st.lists(st.text(alphabet="abc\né😀 \ufffd<", min_size=1, max_size=5), max_size=3)


@st.composite
def grouped(draw: st.DrawFn) -> list[list[int]]:
    ids = draw(IDS)
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]


@settings(max_examples=1500, deadline=None)
@given(grouped(), STOPS, st.booleans(), st.booleans())
def test_the_outcome_does_not_depend_on_how_tokens_are_pushed(
    groups: list[list[int]], stop: list[str], include: bool, skip: bool
) -> None:
    ids = [token for group in groups for token in group]
    want = reference(ids, PIECES, stop, include, skip)
    detok = detokenizer(*PIECES, stop=stop, include_stop=include, skip_special_tokens=skip)
    assert run(detok, groups) == want


@settings(max_examples=300, deadline=None)
@given(IDS, STOPS)
def test_what_is_shown_is_never_taken_back(ids: list[int], stop: list[str]) -> None:
    want, _, _ = reference(ids, PIECES, stop, False, True)
    detok = detokenizer(*PIECES, stop=stop)
    shown = ""
    for i, token in enumerate(ids):
        shown += detok.push([token], final=i == len(ids) - 1).text
        assert want.startswith(shown)


def test_text_is_shown_at_once_when_nothing_can_change_it() -> None:
    detok = detokenizer(b"Hello", b" wor", stop=["world"])
    assert detok.push([300]) == Piece("Hello", 1, None)
    assert detok.push([301]) == Piece(" ", 1, None)  # "wor" may become "world"
    assert detok.push([ord("k")]) == Piece("work", 1, None)


def test_a_character_split_over_tokens_is_shown_whole() -> None:
    detok = detokenizer()
    assert [detok.push([byte]).text for byte in "😀".encode()] == ["", "", "", "😀"]


def test_a_character_that_never_ends_becomes_a_replacement_at_the_end_only() -> None:
    detok = detokenizer()
    assert detok.push([0xF0, 0x9F]).text == ""
    assert detok.push([], final=True).text == "\ufffd"
    assert detokenizer().push([0xF0, ord("a")]).text == "\ufffda"


def test_tokens_behind_a_stop_string_do_not_count() -> None:
    detok = detokenizer(b"one", b"STOP", b"two", stop=["STOP"])
    assert detok.push([300, 301, 302]) == Piece("one", 2, "STOP")
    assert detok.push([302]) == Piece("", 0, "STOP")
    assert detok.push([], final=True) == Piece("", 0, "STOP")


def test_a_stop_string_inside_a_token_cuts_the_text_but_counts_the_token() -> None:
    assert detokenizer(b"end.\n\nMore", stop=["\n\n"]).push([300]) == Piece("end.", 1, "\n\n")
    assert detokenizer(b"end.\n\nMore", stop=["\n\n"], include_stop=True).push([300]) == Piece("end.\n\n", 1, "\n\n")


def test_the_stop_string_that_is_complete_first_counts() -> None:
    assert detokenizer(b"abc", stop=["abc", "b"]).push([300]) == Piece("a", 1, "b")
    assert detokenizer(b"abc", stop=["bc", "abc"]).push([300]) == Piece("", 1, "abc")  # both at "c": the longest


def test_a_false_start_inside_a_stop_string_is_found_again() -> None:
    assert detokenizer(stop=["aab"]).push(list(b"aaab")) == Piece("a", 4, "aab")
    assert detokenizer(stop=["abab!"]).push(list(b"ababab!")) == Piece("ab", 7, "abab!")


def test_special_tokens_are_hidden_or_shown() -> None:
    assert detokenizer().push([97, 256, 98]).text == "ab"
    assert detokenizer(skip_special_tokens=False).push([97, 256, 98]).text == "a<end>b"


def test_the_first_min_tokens_cannot_stop_an_answer() -> None:
    detok = detokenizer(stop=["a"], min_tokens=2)
    assert run(detok, [[97], [97, 98], [97, 98]]) == ("aab", 4, "a")


def test_empty_stop_strings_are_no_stop_strings() -> None:
    assert detokenizer(stop=[""]).push([97, 98]) == Piece("ab", 2, None)


@pytest.mark.parametrize(
    "text", ["The café costs 12 €.", "naïve 😀 日本語\n\n\tdef f(x):\n        return x", "  two leading spaces", "a"]
)
def test_real_tokenizers_one_token_at_a_time(smollm2_gguf: Path, tiny_llama_dir: Path, text: str) -> None:
    for path in (smollm2_gguf, tiny_llama_dir):
        tokenizer = Tokenizer.load(path)
        ids = tokenizer.encode(text, add_special_tokens=False)
        shown, count, stopped = run(Detokenizer(tokenizer), [[i] for i in ids])
        # An answer continues its prompt, so SentencePiece's dummy space stays.
        assert shown == (" " if tokenizer.strips_leading_space else "") + text
        assert (count, stopped) == (len(ids), None)


def test_the_work_per_token_does_not_grow_with_the_answer() -> None:
    """Counted, not timed: a held text that is never released would show as text that comes late."""
    detok = detokenizer(b"ab", stop=["abababababababababc"])
    shown = sum(len(detok.push([300]).text) for _ in range(2000))
    assert shown == 2 * 2000 - len("abababababababababc") + 1
