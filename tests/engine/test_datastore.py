"""A datastore finds what is in it and nothing else, and says in one line why it will not be opened."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import datastore
from engine.continuations import most_frequent
from engine.datastore import SEPARATOR, Datastore, suffix_array
from engine.datastore_header import HEADER_BYTES, SEARCH_TOKENS, Header

FINGERPRINT = b"f" * 32


def store(folder: Path, documents: list[list[int]], vocab_size: int = 8) -> Datastore:
    path = folder / "some.store"
    datastore.build(path, documents, vocab_size, FINGERPRINT)
    return Datastore(path, vocab_size)


def by_hand(
    documents: list[list[int]], context: list[int], longest: int, shortest: int, length: int
) -> tuple[int, list[list[int]]]:
    """The longest run of last tokens that occurs, and what follows each occurrence, padded with -1."""
    for size in range(min(longest, len(context)), shortest - 1, -1):
        tail = context[-size:]
        found = [
            (document[at + size : at + size + length] + [-1] * length)[:length]
            for document in documents
            for at in range(len(document) - size + 1)
            if document[at : at + size] == tail
        ]
        if found:
            return size, sorted(found)
    return 0, []


@settings(max_examples=150, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=4),
    context=st.lists(st.integers(0, 4), max_size=12),
    longest=st.integers(1, 9),
    shortest=st.integers(1, 3),
)
def test_the_longest_match_and_all_its_continuations(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], context: list[int], longest: int, shortest: int
) -> None:
    opened = store(tmp_path_factory.mktemp("store"), documents)
    matches = opened.find(context, longest, shortest)
    size, rows = by_hand(documents, context, longest, shortest, 4)
    assert matches.length == size
    assert sorted(opened.continuations(matches, 4, 10_000).tolist()) == rows


def test_large_ids_keep_their_value_and_their_order(tmp_path: Path) -> None:
    """65536 and beyond: ids in two bytes would fold onto others."""
    rng = random.Random(0)
    ids = [3, 255, 256, 65_535, 65_536, 65_539, 131_072, 199_999]
    document = [rng.choice(ids) for _ in range(3000)]
    opened = store(tmp_path, [document], 200_000)
    for _ in range(200):
        at = rng.randrange(20, 2990)
        matches = opened.find(document[at - 3 : at], 3, 3)
        assert matches.length == 3
        expected = [after for i, after in enumerate([*document, -1]) if document[max(i - 3, 0) : i] == document[at - 3 : at]]
        assert sorted(opened.continuations(matches, 2, 10_000)[:, 0].tolist()) == sorted(expected)


def test_many_matches_are_sampled_evenly(tmp_path: Path) -> None:
    opened = store(tmp_path, [[1, 2, follower] for follower in (3, 4, 5, 6) for _ in range(100)])
    matches = opened.find([1, 2], 2, 2)
    rows = opened.continuations(matches, 1, 40)
    assert len(matches) == 400 and rows.shape == (40, 1)
    opened_all = opened.continuations(matches, 1, 5000)
    assert np.unique(opened_all, return_counts=True)[1].tolist() == [100] * 4


@pytest.mark.parametrize("context", [[], [7], [1, 7], [100], [1 << 31]])
def test_a_context_that_does_not_occur(tmp_path: Path, context: list[int]) -> None:
    opened = store(tmp_path, [[1, 2, 3]])
    matches = opened.find(context, 8, 1)
    assert matches.length == 0 and len(matches) == 0
    assert opened.continuations(matches, 3, 10).shape == (0, 3)


def test_copies_are_sorted_as_far_as_is_searched(tmp_path: Path) -> None:
    block = list(range(8)) * 40
    opened = store(tmp_path, [block] * 20)
    matches = opened.find(block[:100], 1000, 1)
    assert matches.length == SEARCH_TOKENS
    assert opened.continuations(matches, 2, 10)[0].tolist() == [4, 5]


def test_the_suffix_array_leaves_separators_out() -> None:
    text = np.array([SEPARATOR, 2, 1, SEPARATOR, 1, 2, 1, SEPARATOR], np.uint32)
    order = suffix_array(text, 3).tolist()
    assert order == sorted([1, 2, 4, 5, 6], key=lambda at: text[at:].tolist())


def test_what_cannot_be_stored(tmp_path: Path) -> None:
    for documents in ([], [[]]):
        with pytest.raises(ValueError, match="no text to store"):
            datastore.build(tmp_path / "x", documents, 8, FINGERPRINT)
    for bad in (8, -1):
        with pytest.raises(ValueError, match="outside the vocabulary of 8"):
            datastore.build(tmp_path / "x", [[1, bad]], 8, FINGERPRINT)
    assert list(tmp_path.iterdir()) == []


def test_a_build_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = store(tmp_path, [[1, 2, 3]])
    before = opened.path.read_bytes()
    monkeypatch.setattr(datastore.os, "fchmod", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        datastore.build(opened.path, [[4, 5]], 8, FINGERPRINT)
    assert opened.path.read_bytes() == before and list(tmp_path.iterdir()) == [opened.path]


def test_files_that_will_not_do(tmp_path: Path) -> None:
    path = store(tmp_path, [[1, 2, 3, 4]]).path
    whole = path.read_bytes()
    broken = tmp_path / "broken"
    for content, complaint in {
        b"": "not a file that",
        b"PK\x03\x04" + whole[4:]: "not a file that",
        whole[:100]: "cut short",
        whole[:-1]: "bytes where its header says",
        whole + b"\0": "bytes where its header says",
        whole[:8] + struct.pack("<I", 99) + whole[12:]: "format version 99",
        whole[:16] + struct.pack("<I", 0) + whole[20:]: "contradicts itself",
        whole[:20] + struct.pack("<Q", 1 << 40) + whole[28:]: "contradicts itself",
    }.items():
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=complaint) as caught:
            Datastore(broken)
        assert str(broken) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="vocabulary of 8 tokens, the model has 7"):
        Datastore(path, 7)
    assert Datastore(path, 9).header.fingerprint == FINGERPRINT
    with pytest.raises(ValueError, match="absent: No such file"):
        Datastore(tmp_path / "absent")


def test_a_changed_byte_is_found_and_hurts_no_search(tmp_path: Path) -> None:
    rng = random.Random(2)
    document = [rng.randrange(8) for _ in range(200)]
    opened = store(tmp_path, [document])
    assert opened.verify()
    whole = bytearray(opened.path.read_bytes())
    for at in range(HEADER_BYTES, len(whole), 37):
        changed = bytearray(whole)
        changed[at] ^= 0x80
        opened.path.write_bytes(changed)
        other = Datastore(opened.path)
        assert not other.verify()
        for _ in range(3):
            context = [rng.randrange(8) for _ in range(6)]
            try:
                rows = other.continuations(other.find(context, 6, 1), 4, 50)
            except (IndexError, ValueError):  # a place outside the text: the drafter's fault, counted and survived
                continue
            assert rows.shape[1] == 4


def test_the_header_says_what_is_inside(tmp_path: Path) -> None:
    path = store(tmp_path, [[1, 2, 3], [], [4]]).path
    header = Header.read(path)
    assert (header.vocab_size, header.num_tokens, header.num_documents) == (8, 4, 2)
    assert header.file_bytes == path.stat().st_size


# the tree of the most frequent prefixes


def test_prefixes_are_counted_and_the_likeliest_come_first() -> None:
    rows = np.array([[1, 2]] * 3 + [[1, 3]] + [[5, -1]] * 2, np.int32)
    tree = most_frequent(rows, 10, doubt=0)
    assert tree.tokens == [1, 2, 5, 3]
    assert tree.parents == [0, 1, 0, 1]
    assert tree.confidence == pytest.approx([4 / 6, 3 / 4, 2 / 6, 1 / 4])
    assert most_frequent(rows, 2, doubt=0).tokens == [1, 2]
    assert most_frequent(rows, 10, doubt=0, floor=0.3).tokens == [1, 2, 5]
    assert most_frequent(rows, 1, doubt=6).confidence == pytest.approx([4 / 12])


def test_weights_count_rows_more_or_less_than_once() -> None:
    rows = np.array([[1], [2], [2]], np.int32)
    assert most_frequent(rows, 5, doubt=0, weights=np.array([6, 1, 1], np.float32)).confidence == pytest.approx([0.75, 0.25])
    assert most_frequent(rows, 5, doubt=0, weights=np.array([6, 0, 0], np.float32)).tokens == [1]


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([0, 1, 5, 47, 48, 49, 200]), budget=st.integers(0, 20))
def test_few_and_many_rows_are_counted_alike(seed: int, size: int, budget: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, 4, (size, 5)).astype(np.int32)
    rows[rng.random((size, 5)) < 0.1] = -1
    rows[np.minimum.accumulate(rows, axis=1) < 0] = -1
    tree = most_frequent(rows, budget, doubt=0)
    prefixes: dict[tuple[int, ...], int] = {}
    for row in rows.tolist():
        for end in range(1, row.index(-1) + 1 if -1 in row else 6):
            prefixes[tuple(row[:end])] = prefixes.get(tuple(row[:end]), 0) + 1
    paths: list[tuple[int, ...]] = [()]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*paths[parent], token))
    assert len(set(paths)) == len(paths) == 1 + min(budget, len(prefixes))
    counts = {(): size} | prefixes
    survival = {path: float(np.prod([counts[path[: i + 1]] / counts[path[:i]] for i in range(len(path))])) for path in counts}
    left_out = [survival[path] for path in prefixes if path not in paths]
    for path, confidence, parent in zip(paths[1:], tree.confidence, tree.parents, strict=True):
        assert confidence == pytest.approx(counts[path] / counts[paths[parent]])
        assert not left_out or survival[path] >= max(left_out) - 1e-9
