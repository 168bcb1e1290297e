"""What a verdict says of its drafters, and how it adds up: in a row's result, a sequence's usage and the engine's counters."""

from __future__ import annotations

import pytest

from engine.messages import SequenceUsage
from engine.plan import RowResult, StepResult, StepTimes
from engine.protocols import Choice
from engine.row_result import row_result
from engine.stats import StatsRecorder
from engine.tree import DraftForest, Verdict
from engine.usage import add_verdict, by_drafter


def choice(**changes: float) -> Choice:
    """A fused tree of five nodes, a bare root, and a tree of one drafter."""
    forest = DraftForest.from_parents([([0, 1, 2, 3, 4, 5], [-1, 0, 1, 0, 3, 4]), ([7], [-1]), ([8, 9], [-1, 0])], ["a", "", "c"])
    forest.node_drafter = ["", "a", "a", "b", "b", "a", "", "", "c"]
    return Choice(forest, [2, 0, 1], ["cost", "no_match", "goodput"], **changes)


VERDICT = Verdict([[3, 4, 5], [], []], [[3, 4, 5, 6], [1], [2]])


def test_a_row_names_its_drafters_depth_and_reason() -> None:
    made = choice()
    first, second, third = (row_result(10 + b, made, VERDICT, b) for b in range(3))
    assert (first.seq_id, first.token_ids, first.num_draft, first.depth, first.num_dropped) == (10, [3, 4, 5, 6], 5, 3, 2)
    assert (first.drafter, first.drafted_by, first.accepted_by) == ("a", {"a": 3, "b": 2}, {"b": 2, "a": 1})
    assert (first.reason, second.reason, third.reason) == ("cost", "no_match", "goodput")
    assert (second.num_draft, second.depth, second.drafted_by, second.drafter) == (0, 0, {}, "")
    assert (third.drafted_by, third.accepted_by, third.depth) == ({"c": 1}, {}, 1)


def test_seconds_saved_are_the_steps_stood_for_less_what_the_step_took_longer() -> None:
    made = choice(seconds=0.012, plain_seconds=0.009, decode_seconds=0.006)
    saved = [row_result(b, made, VERDICT, b).seconds_saved for b in range(3)]
    assert saved == pytest.approx([(3 * 0.006 - 0.003) / 3, -0.001, -0.001])
    assert row_result(0, choice(), VERDICT, 0).seconds_saved == 0.0
    assert row_result(0, made, Verdict([[], [], []], [[], [1], [2]]), 0).seconds_saved == 0.0


def test_what_lies_behind_the_end_of_a_sequence_was_not_accepted() -> None:
    row = row_result(0, choice(), VERDICT, 0)
    assert by_drafter(row, 3) == ({"a": 3, "b": 2}, {"b": 2, "a": 1})
    assert by_drafter(row, 2) == ({"a": 3, "b": 2}, {"b": 2})
    assert by_drafter(row, 1) == ({"a": 3, "b": 2}, {"b": 1})
    assert by_drafter(row, 0) == ({"a": 3, "b": 2}, {})
    assert by_drafter(RowResult(0, [1, 2], 4, "x"), 1) == ({"x": 4}, {"x": 1})
    assert by_drafter(RowResult(0, [1]), 0) == ({}, {})


def test_a_sequences_usage_adds_up() -> None:
    usage, made = SequenceUsage(), choice(seconds=0.012, plain_seconds=0.009, decode_seconds=0.006)
    for b, accepted in ((0, 3), (1, 0), (2, 0), (0, 1)):
        add_verdict(usage, row_result(0, made, VERDICT, b), accepted, frozenset({"b"}))
    assert (usage.steps, usage.drafted_tokens, usage.accepted_tokens) == (4, 11, 4)
    assert usage.accepted_per_position == [2, 1, 1]
    assert (usage.drafted_by, usage.accepted_by) == ({"a": 6, "b": 4, "c": 1}, {"b": 3, "a": 1})
    assert (usage.accepted_prediction_tokens, usage.rejected_prediction_tokens) == (3, 1)
    assert usage.budget_reasons == {"cost": 2, "no_match": 1, "goodput": 1}
    assert usage.seconds_saved == pytest.approx(0.005 * 2 - 0.002)


def test_the_engines_counters_add_up() -> None:
    recorder, made = StatsRecorder(), choice()
    rows = [row_result(b, made, VERDICT, b) for b in range(3)]
    for row, accepted in zip(rows, (2, 0, 0), strict=True):
        recorder.verdict(row, len(row.token_ids), accepted)
    recorder.step(StepResult(rows, StepTimes(), 9, {"slow": 1}, {"a": 0.1}, 4.5, 0.02), 0.03)
    recorder.step(StepResult([RowResult(0, [])], StepTimes(), 64, {"slow": 1}, {"a": 0.1, "b": 0.2}), 0.5)  # decided nothing
    stats = recorder.take(running=1, waiting=0, blocks_used=0, blocks_total=9, calibration_error=0.1, cost_error=0.2)
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens, stats.num_dropped_tokens) == (2, 6, 2, 3)
    assert stats.drafts_by_drafter == {"a": 1, "b": 1, "c": 1}
    assert stats.draft_tokens_by_drafter == {"a": 3, "b": 2, "c": 1}
    assert stats.accepted_tokens_by_drafter == {"a": 0, "b": 2, "c": 0}
    assert stats.seconds_draft_by_drafter == pytest.approx({"a": 0.2, "b": 0.2}) and stats.drafter_fallbacks == {"slow": 2}
    assert (stats.predicted_tokens, stats.predicted_seconds) == (4.5, 0.02)
    assert (stats.decided_tokens, stats.decided_seconds) == (6, 0.03)
    assert stats.draft_depths == [3, 0] and stats.draft_nodes == [6, 0]
    assert (stats.calibration_error, stats.cost_error) == (0.1, 0.2)
    assert recorder.take(running=0, waiting=0, blocks_used=0, blocks_total=9).draft_depths == []
