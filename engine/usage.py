"""What a verdict adds to the totals of its sequence."""

from __future__ import annotations

from engine.messages import SequenceUsage
from engine.plan import RowResult


def by_drafter(row: RowResult, accepted: int) -> tuple[dict[str, int], dict[str, int]]:
    """Nodes shown and nodes that were committed, by drafter; `accepted` of them may be fewer than stood, at a sequence's end."""
    if not row.num_draft:
        return {}, {}
    drafted = row.drafted_by or {row.drafter: row.num_draft}
    stood = dict(row.accepted_by or {row.drafter: row.num_accepted})
    surplus = row.num_accepted - accepted
    for name, count in reversed(list(stood.items())):  # the last of the path were cut
        taken = min(count, surplus)
        stood[name], surplus = count - taken, surplus - taken
    return drafted, {name: count for name, count in stood.items() if count}


def add_verdict(usage: SequenceUsage, row: RowResult, accepted: int, predicting: frozenset[str]) -> None:
    """One verify step, `accepted` of whose draft nodes were committed; `predicting`: drafters of predicted tokens."""
    usage.steps += 1
    usage.drafted_tokens += row.num_draft
    usage.accepted_tokens += accepted
    usage.seconds_saved += row.seconds_saved
    if row.reason:
        usage.budget_reasons[row.reason] = usage.budget_reasons.get(row.reason, 0) + 1
    count_depths(usage.accepted_per_position, accepted)
    drafted, stood = by_drafter(row, accepted)
    for name, count in drafted.items():
        usage.drafted_by[name] = usage.drafted_by.get(name, 0) + count
        if name in predicting:
            usage.accepted_prediction_tokens += stood.get(name, 0)
            usage.rejected_prediction_tokens += count - stood.get(name, 0)
    for name, count in stood.items():
        usage.accepted_by[name] = usage.accepted_by.get(name, 0) + count


def count_depths(per_position: list[int], accepted: int) -> None:
    """per_position[d]: steps whose draft stood to depth d + 1 or further."""
    per_position.extend([0] * (accepted - len(per_position)))
    for depth in range(accepted):
        per_position[depth] += 1
