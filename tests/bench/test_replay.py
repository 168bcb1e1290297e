"""What a replay counts, on texts whose steps can be counted by hand; and that a recording is what the model says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from bench.prompts import load
from bench.recording import TOP, Recorded, from_texts, read, record, write
from bench.replay import Tally, main, replay, rounds, total
from engine.drafters.ngram import NgramDrafter
from engine.drafters.none import NoneDrafter
from engine.drafters.suffix import SuffixDrafter
from engine.tree import DraftForest
from server.tokenizer import Tokenizer

PROMPT = list(range(100, 140))
COPY = Recorded("copy", "copy", 0.0, 0, 0, PROMPT, [100, *range(101, 133)])


def test_plain_decoding_takes_a_step_per_token() -> None:
    tally = replay(NoneDrafter(), COPY, 0, budget=8)
    assert (tally.tokens, tally.steps, tally.drafted, tally.accepted) == (33, 33, 0, 0)
    assert math.isnan(tally.calibration_error)


def test_drafts_that_the_answer_follows_stand_and_bring_a_bonus() -> None:
    tally = replay(NgramDrafter(), COPY, 0, budget=8)
    # The first token comes alone; then matches of 1, 3, 7 and 15 tokens draft 1, 5, 8 and 8, and the last step what is left.
    assert tally.tokens == 33
    assert tally.accepted == tally.drafted == 33 - tally.steps
    assert tally.steps <= 6


def test_the_second_asking_is_counted_apart_and_only_where_it_says_something() -> None:
    sampled = Recorded("s", "open", 0.7, 1, 0, [1, 2, 3], [9, 8, 7, 6])
    greedy = Recorded("g", "open", 0.0, 1, 0, [4, 5, 6], list(range(50, 90)))
    found = rounds(SuffixDrafter(), [greedy, sampled], budget=8)
    assert set(found) == {("first", "open", 0.0), ("first", "open", 0.7), ("again", "open", 0.0)}
    assert found["first", "open", 0.0].steps == 40
    assert found["again", "open", 0.0].steps == 5
    assert total(found.values()).tokens == 84


def test_calibration_compares_confidence_with_what_stood() -> None:
    class HalfRight(NoneDrafter):
        """Drafts the right token and a wrong one, and expects 0.5 of each."""

        def draft(self, seqs, budgets):  # type: ignore[no-untyped-def]
            import numpy as np

            truth = COPY.answer[seqs[0].num_output]
            forest = DraftForest.from_parents([([seqs[0].tokens[-1], truth, 7], [-1, 0, 0])], ["d"])
            forest.confidence = np.array([1, 0.5, 0.5], np.float32)
            return forest

    tally = replay(HalfRight(), COPY, 0, budget=8)
    assert tally.judged[5] == 2 * tally.steps and tally.stood[5] == tally.steps
    assert tally.calibration_error == pytest.approx(0)


def test_a_recording_survives_its_file_and_a_broken_one_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recording.jsonl"
    write(path, [COPY, COPY])
    assert read(path) == [COPY, COPY]
    path.write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="line 1"):
        read(path)


def test_tallies_add_up() -> None:
    one, two = Tally(tokens=3, steps=2), Tally(tokens=4, steps=1)
    one.judged[3] = 5
    two.judged[3] = 6
    assert total([one, two]).tokens == 7 and total([one, two]).judged[3] == 11


def test_a_model_is_recorded_and_replayed(tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = record(
        str(tiny_llama_dir), [p for p in load() if len(p.messages[0]["content"]) < 120][:1], 6, [0.0, 0.7], 2, threads=1
    )
    assert sorted((one.temperature, one.sample) for one in found) == [(0.0, 0), (0.7, 0), (0.7, 1)]
    for one in found:
        assert 0 < len(one.answer) <= 6 and len(one.top_ids) == len(one.top_logits) == len(one.answer)
        assert all(len(row) == TOP and row == sorted(row, reverse=True) for row in one.top_logits)
        if one.temperature == 0:
            assert [row[0] for row in one.top_ids] == one.answer
    write(tmp_path / "r.jsonl", found)
    assert main(["run", str(tmp_path / "r.jsonl"), "--drafters", "ngram,suffix,token_recycling,stand,aded", "--categories"]) == 0
    shown = capsys.readouterr().out
    assert "| again |" in shown and "token_recycling" in shown and "KiB" in shown


def test_written_answers_are_read_from_data_files(tiny_llama_dir: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(tiny_llama_dir)
    path = tmp_path / "data.jsonl"
    talk = {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]}
    lines = [{"prompt": "def f():", "canonical_solution": " return 1"}, {"question": "1+1?", "answer": "2"}, talk]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [one.category for one in from_texts(path, tokenizer, 10)] == ["data"] * 3
    assert len(from_texts(path, tokenizer, 2)) == 2
    path.write_text('{"text": "no answer here"}\n')
    with pytest.raises(ValueError, match="neither"):
        from_texts(path, tokenizer, 10)
