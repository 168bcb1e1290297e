"""What speculation did for one answer: `metrics.speculative_decoding`, for those who ask with `include_speculation`.

Names that vLLM has are vLLM's. A step is one forward of the model for one sequence that committed tokens, whether anything
was drafted for it or not, so `mean_acceptance_length` is tokens per forward, what speculation is worth (an answer that ends
with a draft token counts the bonus that was not needed). Counts are sums over the choices of the answer; tokens that a step
committed behind the end of a stop string count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import Any

from engine.messages import SequenceUsage


def speculation_report(usages: Sequence[SequenceUsage], *, num_spec_tokens: int, verifier: str, lossless: bool) -> dict[str, Any]:
    """`num_spec_tokens`: the most draft nodes a step might have had. Acceptance is 0 where nothing was drafted."""
    steps = sum(usage.steps for usage in usages)
    drafted = sum(usage.drafted_tokens for usage in usages)
    accepted = sum(usage.accepted_tokens for usage in usages)
    positions = [sum(counts) for counts in zip_longest(*(usage.accepted_per_position for usage in usages), fillvalue=0)]
    return {
        "mean_acceptance_length": _ratio(steps + accepted, steps),
        "draft_acceptance_rate": _ratio(accepted, drafted),
        "acceptance_histogram": _histogram(positions, steps),
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": drafted,
        "num_spec_tokens": num_spec_tokens,
        "num_accepted_tokens_per_pos": positions,
        "drafters": _by_drafter(usages),
        "budget_reasons": _sum(usage.budget_reasons for usage in usages),
        "estimated_seconds_saved": round(sum(usage.seconds_saved for usage in usages), 6),
        "verifier": verifier,
        "lossless": lossless,
    }


def _ratio(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def _histogram(positions: list[int], steps: int) -> list[int]:
    """[k]: steps that accepted exactly k draft tokens, from "k or more" for every k."""
    at_least = [steps, *positions, 0]
    return [max(more - fewer, 0) for more, fewer in pairwise(at_least)]


def _by_drafter(usages: Sequence[SequenceUsage]) -> dict[str, dict[str, int]]:
    drafted, accepted = _sum(usage.drafted_by for usage in usages), _sum(usage.accepted_by for usage in usages)
    return {
        name: {"num_draft_tokens": count, "num_accepted_draft_tokens": accepted.get(name, 0)} for name, count in drafted.items()
    }


def _sum(tables: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table)
    return dict(total)
