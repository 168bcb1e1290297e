"""A long prompt is read in portions: no step pays for all of it, and in the end the drafts are what they would have been."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from pathlib import Path

import pytest

from engine import datastore, reading
from engine.drafters.ngram import NgramDrafter
from engine.drafting import Drafting
from engine.protocols import Drafter, Observed, Reads
from engine.reading import NEAR, PORTION
from engine.registry import make_drafter
from engine.request import Request, SamplingParams, Speculation
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.worker import Worker
from tests.engine.models import tiny
from tests.engine.real import answers, load_worker, make_engine, request
from tests.engine.test_drafting import Scripted, chains

VOCAB = 50
NAMES = ["ngram", "suffix", "rasd", "aded"]


@pytest.fixture
def store(tmp_path: Path) -> str:
    datastore.build(tmp_path / "store", [[VOCAB - 1, VOCAB - 2]], VOCAB, b"f" * 32)
    return str(tmp_path / "store")


def sequence(seq_id: int, length: int, salt: str = "", drafters: list[str] | None = None, off: bool = False) -> Sequence:
    """Its prompt repeats itself."""
    rng = random.Random(seq_id)
    period = [rng.randrange(VOCAB - 2) for _ in range(40)]
    prompt = [token if rng.random() < 0.9 else rng.randrange(VOCAB - 2) for token in (period * (length // 40 + 1))[:length]]
    params = SamplingParams(max_tokens=1000, temperature=0.0)
    speculation = Speculation(drafters=drafters, off=off)
    request = Request(request_id="r", prompt_ids=prompt, params=params, cache_salt=salt, speculation=speculation)
    return Sequence(seq_id, request)


def make(name: str, store: str) -> Drafter:
    return make_drafter(name, {"vocab_size": VOCAB, "datastore": store})


def drafts(drafter: Drafter, seqs: Seq[Sequence]) -> list[list[int]]:
    forest = drafter.draft(seqs, [6] * len(seqs))
    return [forest.token[forest.nodes(b)].tolist()[1:] for b in range(len(seqs))]


def told(drafter: Drafter, seq: Sequence, tokens: list[int]) -> None:
    """A step in which nothing was drafted."""
    for token in tokens:
        drafter.observe([seq], DraftForest.roots([seq.tokens[-1]]), Verdict([[]], [[token]]), Observed())
        seq.commit([token])


class Text:
    def __init__(self) -> None:
        self.num_read = 0

    def read(self, tokens: list[int], end: int) -> None:
        assert tokens[self.num_read : end]
        self.num_read = end


def test_a_step_reads_a_portion_the_shortest_first_and_who_is_near_always() -> None:
    lengths = [3 * PORTION, NEAR, 1000, PORTION, *[NEAR] * 100]
    pairs = [(Text(), sequence(i, length)) for i, length in enumerate(lengths)]
    reading.read_on(pairs)
    assert [text.num_read for text, _ in pairs] == [0, NEAR, 1000, PORTION - 1000, *[NEAR] * 100]
    for _ in range(4):
        reading.read_on(pairs)
    assert [text.num_read for text, _ in pairs] == lengths
    reading.read_on(pairs)  # nothing is new: nothing is read


@pytest.mark.parametrize("name", NAMES)
def test_no_step_reads_more_than_its_portion_and_the_guess_comes_in_the_end(
    name: str, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seq = make(name, store), sequence(1, 5 * PORTION)
    monkeypatch.setattr(reading, "PORTION", 100 * PORTION)
    (wanted,) = drafts(whole, [seq])
    assert wanted
    monkeypatch.undo()
    drafter = make(name, store)
    found = [drafts(drafter, [seq])[0] for _ in range(5)]
    assert found[-1] == wanted
    if name != "aded":  # it guesses from what it has read
        assert found[:-1] == [[]] * 4


@pytest.mark.parametrize("name", NAMES)
def test_what_was_read_with_the_prompt_is_there_at_the_first_draft(name: str, store: str) -> None:
    seq, drafter = sequence(1, 3 * PORTION), make(name, store)
    drafting = Drafting([drafter], VOCAB)
    for _ in range(3):
        drafting.read([seq])
    late = make(name, store)
    for _ in range(3):
        drafts(late, [seq])
    assert drafts(drafter, [seq]) == drafts(late, [seq]) != [[]]


@pytest.mark.parametrize("name", NAMES)
def test_company_with_long_prompts_changes_no_draft_of_who_is_running(name: str, store: str) -> None:
    alone, crowded = make(name, store), make(name, store)
    own, same = sequence(1, 900, "own"), sequence(1, 900, "own")
    assert drafts(alone, [own]) == drafts(crowded, [same])
    others = [sequence(i, 2 * PORTION, "others") for i in range(2, 6)]
    rng, found = random.Random(0), 0
    for _ in range(6):
        said = own.tokens[-40:][: rng.randint(1, NEAR)]
        told(alone, own, said)
        told(crowded, same, said)
        (wanted,) = drafts(alone, [own])
        assert drafts(crowded, [*others, same])[-1] == wanted
        found += len(wanted)
    assert found


def test_an_answer_that_ends_before_its_prompt_is_read_is_remembered() -> None:
    """suffix: what was answered needs no reading of the prompt, neither to be kept nor to be found."""
    drafter = make_drafter("suffix", {})
    first = sequence(1, 3 * PORTION)
    told(drafter, first, [7, 8, 9, 10])
    drafter.forget(1)
    again = sequence(1, 3 * PORTION)
    again.seq_id = 2
    assert drafts(drafter, [again]) == [[7, 8, 9, 10]]
    drafter.forget(2)


def test_who_left_while_it_was_read_leaves_nothing_behind() -> None:
    drafter = make_drafter("suffix", {})
    assert isinstance(drafter, Reads)
    seq = sequence(1, 3 * PORTION)
    drafter.read([seq])
    drafter.forget(1)
    assert not drafter._readers and not drafter.num_bytes  # type: ignore[attr-defined]


# through Drafting


class Reader(Scripted):
    def __init__(self, name: str) -> None:
        super().__init__(name, chains([1]))
        self.texts: list[list[int]] = []
        self.error: Exception | None = None

    def read(self, seqs: Seq[Sequence]) -> None:
        if self.error:
            raise self.error
        self.texts.append([seq.seq_id for seq in seqs])


def test_only_drafters_that_read_are_told_and_only_of_requests_that_want_them() -> None:
    reader, other = Reader("reader"), Scripted("other", chains([2]))
    drafting = Drafting([other, reader], VOCAB)
    drafting.read([sequence(1, 9), sequence(2, 9, drafters=["other"]), sequence(3, 9, drafters=["reader"])])
    drafting.read([sequence(2, 9, drafters=["other"]), sequence(4, 9, off=True)])
    drafting.read([])
    assert reader.texts == [[1, 3]] and other.asked == []


def test_one_that_fails_to_read_costs_nothing_but_its_guess() -> None:
    reader, next_one = Reader("reader"), Reader("next")
    reader.error = ValueError("broken")
    drafting = Drafting([reader, next_one], VOCAB)
    drafting.read([sequence(1, 9)])
    assert next_one.texts == [[1]] and drafting.take_fallbacks() == {"raised": 1}


# in an engine


class Watched(NgramDrafter):
    """Notes what was read of which sequence, while its prompt was computed and before the first draft."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, int]] = []

    def read(self, seqs: Seq[Sequence]) -> None:
        super().read(seqs)
        self.log += [(seq.request.request_id, self._indices[seq.seq_id].num_read) for seq in seqs]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Worker:
    path = tmp_path_factory.mktemp("model")
    tiny.save(tiny.model(tiny.config("Llama", max_position_embeddings=256)), path)
    return load_worker(path, block_size=8)


def test_chunks_are_read_along_and_what_a_prefix_hit_skipped_is_caught_up(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "PORTION", 16)
    monkeypatch.setattr(reading, "NEAR", 4)
    prompt = [1 + i % 7 for i in range(120)]
    asked = [request(name, prompt, max_tokens=40, temperature=0.0, ignore_eos=True) for name in ("computed", "cached")]
    drafter = Watched()
    plain = answers(make_engine(worker), asked[:1])["computed", 0].tokens
    engine = make_engine(worker, [drafter], max_num_batched_tokens=16)
    for one in asked:
        assert answers(engine, [one])[one.request_id, 0].tokens == plain
    read = {name: [count for named, count in drafter.log if named == name] for name in ("computed", "cached")}
    assert read["computed"][:8] == [16, 32, 48, 64, 80, 96, 112, 120]
    assert read["cached"][:7] == [16, 32, 48, 64, 80, 96, 112] and read["cached"][-1] > 120
    assert engine.stats().num_draft_tokens > 0
