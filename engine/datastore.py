"""A datastore: a text of token ids on disk, indexed so that one search finds where a context occurs in it and what follows.

Built offline (`outrider datastore build`), mapped read-only at serve time: only the pages a search touches take memory, and
they are the page cache's. It is the operator's own text and every request may be served from it; nothing is ever added to
it at run time, so no tenant learns from another through it.

The text lies backwards in the file, and what is sorted are its suffixes: a context is then read from its end, so that a single
binary search finds the place where the longest match must lie, and the matches of that length are a range around it. (REST,
arXiv 2311.08252, searches forwards, once for every length it tries.) Ids are big-endian uint32, so that comparing
bytes compares tokens; SEPARATOR stands between documents, and no match crosses it.
"""

from __future__ import annotations

import mmap
import os
import sys
import tempfile
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.datastore_header import HEADER_BYTES, LARGEST, SEARCH_TOKENS, Header

Ids = NDArray[np.int32]

SEPARATOR = 0xFFFFFFFF
_ID = np.dtype(">u4")
_PLACE = np.dtype("<i4")


class Matches(NamedTuple):
    """`length` tokens of context occur as the suffixes first..last-1 of the suffix array; (0, 0, 0) when there are none."""

    length: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first


class Datastore:
    """A datastore file, open for searching. Safe to share: it never changes."""

    def __init__(self, path: str | Path, vocab_size: int | None = None) -> None:
        """Raises ValueError, one line that names the file, for a file that is broken or made for another vocabulary than the
        model's `vocab_size` ids; OSError when it cannot be read."""
        self.path = Path(path)
        self.header = Header.read(path)
        if vocab_size is not None and self.header.vocab_size > vocab_size:
            raise ValueError(
                f"datastore {path}: built for a vocabulary of {self.header.vocab_size} tokens, the model has {vocab_size}"
            )
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)  # a search touches a page here and there: reading ahead would be in vain
        sizes = (self.header.vocab_size + 1, self.header.num_places, self.header.num_tokens)
        text_at = HEADER_BYTES + 4 * sizes[0]
        self._text_at = text_at
        self._first = np.frombuffer(self._map, _PLACE, sizes[0], HEADER_BYTES)
        self._text = np.frombuffer(self._map, _ID, sizes[1], text_at)
        self._suffixes = np.frombuffer(self._map, _PLACE, sizes[2], text_at + 4 * sizes[1])
        self._places = memoryview(self._map)[text_at + 4 * sizes[1] :].cast("i") if sys.byteorder == "little" else self._suffixes

    def find(self, context: Sequence[int], longest: int, shortest: int) -> Matches:
        """The matches of the longest run of last tokens of `context` that occurs, at most `longest` and at least `shortest`.

        O(longest log n): three binary searches among the suffixes that begin with the last token.
        """
        longest = min(longest, len(context), SEARCH_TOKENS)
        if longest < shortest or shortest < 1:
            return NOTHING
        tail = context[-1 : -longest - 1 : -1]
        if not 0 <= tail[0] < self.header.vocab_size:
            return NOTHING
        first, last = int(self._first[tail[0]]), int(self._first[tail[0] + 1])
        if first >= last:
            return NOTHING
        pattern = b"".join(token.to_bytes(4, "big") for token in tail)
        key = self._key(len(pattern))
        at = bisect_left(self._places, pattern, first, last, key=key)
        near = [key(self._places[i]) for i in (at - 1, at) if first <= i < last]
        length = max(_common(pattern, other) for other in near)
        if length < shortest:
            return NOTHING
        prefix = pattern[: 4 * length]
        key = self._key(len(prefix))
        first = bisect_left(self._places, prefix, first, at, key=key)
        last = bisect_right(self._places, prefix, max(at, first), last, key=key)
        return Matches(length, first, last)

    def continuations(self, matches: Matches, length: int, most: int) -> Ids:
        """What follows the matches, [min(matches, most), length]; -1 from the end of a document on. Sampled evenly."""
        count = min(len(matches), most)
        picks = matches.first + (np.arange(count) * len(matches)) // max(count, 1)
        ends = self._suffixes[picks].astype(np.int64)  # in the backward text, the place of the context's last token
        places = ends[:, None] - np.arange(1, length + 1)
        tokens = self._text[np.maximum(places, 0)].astype(np.int64)
        tokens[(places < 0) | (tokens >= self.header.vocab_size)] = -1
        ended = np.minimum.accumulate(tokens, axis=1) < 0
        tokens[ended] = -1
        return tokens.astype(np.int32)

    def verify(self) -> bool:
        """Whether the bytes are those that were written; reads the whole file."""
        checksum = 0
        for at in range(HEADER_BYTES, len(self._map), 1 << 24):
            checksum = zlib.crc32(self._map[at : at + (1 << 24)], checksum)
        return checksum == self.header.checksum

    def _key(self, size: int):  # type: ignore[no-untyped-def]  # a closure for bisect: place -> bytes
        text, at = self._map, self._text_at

        def key(place: int) -> bytes:
            begin = at + 4 * place
            return text[begin : begin + size]

        return key


NOTHING = Matches(0, 0, 0)


def _common(one: bytes, other: bytes) -> int:
    """Tokens that two byte strings begin with alike."""
    length, most = 0, min(len(one), len(other))
    while length < most and one[length : length + 4] == other[length : length + 4]:
        length += 4
    return length // 4


def build(path: str | Path, documents: Iterable[Sequence[int]], vocab_size: int, fingerprint: bytes) -> Header:
    """Write the datastore of some token sequences. It appears under its name only when it is whole.

    Takes about 70 bytes of memory per token (10 million: 17 s). Raises ValueError when there is nothing to store, more than 2^31
    tokens, or an id outside the vocabulary; OSError when it cannot be written.
    """
    backward, count = _backward(documents, vocab_size)
    suffixes = suffix_array(backward, vocab_size)
    first = np.searchsorted(backward[suffixes], np.arange(vocab_size + 1)).astype(_PLACE)
    parts = [part.tobytes() for part in (first, backward.astype(_ID), suffixes.astype(_PLACE))]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    header = Header(vocab_size, len(backward), len(suffixes), count, fingerprint, checksum)
    _write(Path(path), [header.pack(), *parts])
    return header


def _backward(documents: Iterable[Sequence[int]], vocab_size: int) -> tuple[NDArray[np.uint32], int]:
    """All documents in one, backwards, a separator before and behind each; and how many there are."""
    border = np.full(1, SEPARATOR, np.uint32)
    parts, count, total = [border], 0, 1
    for document in documents:
        if not len(document):
            continue
        ids = np.asarray(document, dtype=np.int64)
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(f"a token id outside the vocabulary of {vocab_size}")
        parts += [ids.astype(np.uint32), border]
        count, total = count + 1, total + len(ids) + 1
        if total > LARGEST:
            raise ValueError(f"more than {LARGEST} tokens: build several datastores of it")
    if not count:
        raise ValueError("there is no text to store")
    return np.concatenate(parts)[::-1].copy(), count


def suffix_array(text: NDArray[np.uint32], vocab_size: int) -> NDArray[np.int64]:
    """The places of `text` that hold a token, in the order of the SEARCH_TOKENS ids that begin there; separators are largest.

    Prefix doubling (Manber and Myers 1993): the order by 2k ids is the order by (rank by k ids here, rank by k ids k further on),
    O(n log n) for each doubling. It stops at SEARCH_TOKENS, so that a text of copies costs no more than any other.
    """
    rank = np.minimum(text, vocab_size).astype(np.int64)
    tokens = np.flatnonzero(rank < vocab_size)
    width, distinct = 1, vocab_size + 1
    order = tokens
    while width < SEARCH_TOKENS:
        shifted = np.zeros_like(rank)
        shifted[:-width] = rank[width:]  # behind the end there is a separator: no pattern reaches further
        key = rank * distinct + shifted
        order = np.argsort(key, kind="stable")
        steps = np.diff(key[order]) != 0
        rank = np.empty_like(rank)
        rank[order] = np.concatenate(([0], np.cumsum(steps)))
        distinct, width = len(rank), 2 * width
        if steps.all():
            break
    return order[text[order] != SEPARATOR]


def _write(path: Path, parts: list[bytes]) -> None:
    handle, name = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            for part in parts:
                file.write(part)
            os.fchmod(file.fileno(), 0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
