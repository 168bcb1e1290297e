"""What a comparison of several arms comes to: a table of medians, a table of ratios, and how many answers are equal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.arithmetic import median
from bench.summary import Numbers, markdown
from bench.workloads import WORKLOADS


@dataclass(slots=True)
class Round:
    """One arm, started once and asked everything."""

    start_seconds: float
    peak_mb: float
    workloads: dict[str, Numbers]
    texts: dict[str, str] = field(default_factory=dict)  # workload/prompt -> answer, of the one-stream workloads

    def score(self, name: str) -> float:
        """The number that ranks the workload; NaN when this arm was not asked or an answer failed."""
        workload = next((w for w in WORKLOADS if w.name == name), None)
        numbers = self.workloads.get(name)
        if numbers is None or numbers["errors"]:
            return math.nan
        return numbers[workload.score if workload else "total_rate"]


def report(rounds: dict[str, list[Round]], reference: str) -> str:
    """Two tables: the medians of every arm, and the reference's speed over each arm's, paired round by round."""
    known = [w.name for w in WORKLOADS]
    asked = {name for done in rounds.values() for one in done for name in one.workloads}
    names = [name for name in known if name in asked] + sorted(asked - set(known))
    values = [["arm", *names, "start s", "peak MB", "client CPU %"]]
    ratios = [[f"{reference} / arm", *names]]
    for arm, done in rounds.items():
        shares = [numbers["client_cpu_share"] for one in done for numbers in one.workloads.values()]
        values.append(
            [
                arm,
                *(_number(_median([one.score(name) for one in done]), ".1f") for name in names),
                _number(median([one.start_seconds for one in done]), ".1f"),
                _number(median([one.peak_mb for one in done]), ".0f"),
                _number(max(shares, default=math.nan) * 100, ".1f"),
            ]
        )
        pairs = list(zip(rounds.get(reference, []), done, strict=False))
        ratios.append([arm, *(_number(_median([a.score(n) / b.score(n) for a, b in pairs]), ".2f") for n in names)])
    return markdown(values) + "\n\n" + markdown(ratios) + "\n\n" + equality(rounds, reference)


def equality(rounds: dict[str, list[Round]], reference: str) -> str:
    """How many greedy answers of each arm are letter for letter those of the reference (one stream, first round)."""
    if not rounds.get(reference):
        return ""
    expected = rounds[reference][0].texts
    lines = []
    for arm, done in rounds.items():
        shared = [key for key in done[0].texts if key in expected]
        if arm != reference and shared:
            same = sum(done[0].texts[key] == expected[key] for key in shared)
            lines.append(f"{arm}: {same} of {len(shared)} answers equal those of {reference}")
    return "\n".join(lines)


def _median(values: Sequence[float]) -> float:
    return median([value for value in values if not math.isnan(value)])


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
