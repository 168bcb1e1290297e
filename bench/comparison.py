"""What a comparison of several arms comes to: tables of medians and of paired ratios, and how many answers are equal.

Its matter is one record per arm, group of workloads and round, so a comparison may be run in parts. Ratios are taken
between records of the same round of the same run, then their median; only where two arms never shared a round it is the
ratio of their medians, marked ~.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.arithmetic import median
from bench.arms import FIXED, GOODPUT, OFF, PEER
from bench.summary import Numbers, markdown
from bench.workloads import AGAIN, WORKLOADS

Round = tuple[str, int]  # run and number
KNOWN = {workload.name: workload for workload in WORKLOADS}
WHOLE = ", whole"  # a second asking also counts with its prefill: the prefix cache is part of it


@dataclass(slots=True)
class Record:
    """One arm, started once and asked one group."""

    arm: str
    kind: str
    run: str  # when its run began
    round: int
    start_seconds: float
    peak_mb: float
    workloads: dict[str, Numbers]
    texts: dict[str, str] = field(default_factory=dict)  # workload/prompt -> answer, of the one-stream workloads

    @classmethod
    def read(cls, line: dict[str, Any]) -> Record:
        return cls(**{name: line[name] for name in cls.__dataclass_fields__})


def score(numbers: Numbers, column: str) -> float:
    """The number that the column shows; NaN when an answer failed."""
    if numbers["errors"]:
        return math.nan
    workload = KNOWN.get(column)
    return numbers[workload.score if workload else "total_rate"]


@dataclass(slots=True)
class Measured:
    """All that is known of some arms."""

    records: list[Record]

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(record.arm for record in self.records))

    @property
    def columns(self) -> list[str]:
        asked = {name for record in self.records for name in record.workloads}
        names = [name for name in KNOWN if name in asked] + sorted(asked - KNOWN.keys())
        return [column for name in names for column in ([name, name + WHOLE] if name.endswith(AGAIN) else [name])]

    def of_kind(self, kind: str) -> list[str]:
        kinds = {record.arm: record.kind for record in self.records}
        return [arm for arm in self.arms if kinds[arm] == kind]

    def scores(self, arm: str, column: str) -> dict[Round, float]:
        """What the arm reached in each round in which it was asked and nothing failed."""
        name = column.removesuffix(WHOLE)
        found = {
            (record.run, record.round): score(record.workloads[name], column)
            for record in self.records
            if record.arm == arm and name in record.workloads
        }
        return {key: value for key, value in found.items() if not math.isnan(value)}

    def value(self, arm: str, column: str) -> float:
        return median(list(self.scores(arm, column).values()))

    def ratio(self, arm: str, other: str, column: str) -> tuple[float, bool]:
        """How many times as fast `arm` is, and whether that was taken within rounds. NaN when one has no figure."""
        ours, theirs = self.scores(arm, column), self.scores(other, column)
        shared = ours.keys() & theirs.keys()
        if shared:
            return median([ours[key] / theirs[key] for key in shared]), True
        return median(list(ours.values())) / median(list(theirs.values())), False

    def best(self, arms: Iterable[str], column: str) -> str | None:
        """The fastest by its median; None when none has a figure."""
        values = {arm: self.value(arm, column) for arm in arms}
        known = {arm: value for arm, value in values.items() if not math.isnan(value)}
        return max(known, key=known.__getitem__) if known else None


def report(records: Sequence[Record]) -> str:
    """Everything that is said of the records: medians, ratios to off, ratios of goodput, goals, equal answers."""
    measured = Measured(list(records))
    parts = [speeds(measured), ratios_to(measured, OFF)]
    if GOODPUT in measured.arms:
        parts += [ratios_of(measured, GOODPUT), goals(measured)]
    return "\n\n".join(part for part in [*parts, equality(measured, OFF)] if part)


def speeds(measured: Measured) -> str:
    """Medians in tokens per second, with what each arm costs to start and to hold."""
    rows = [["tokens/s", *measured.columns, "start s", "peak MB", "client CPU %"]]
    for arm in measured.arms:
        own = [record for record in measured.records if record.arm == arm]
        shares = [numbers["client_cpu_share"] for record in own for numbers in record.workloads.values()]
        rows.append(
            [
                arm,
                *(_number(measured.value(arm, column), ".1f") for column in measured.columns),
                _number(median([record.start_seconds for record in own]), ".1f"),
                _number(max(record.peak_mb for record in own), ".0f"),
                _number(max(shares, default=math.nan) * 100, ".1f"),
            ]
        )
    return markdown(rows)


def ratios_to(measured: Measured, reference: str) -> str:
    if reference not in measured.arms:
        return ""
    rows = [[f"arm / {reference}", *measured.columns]]
    return markdown([*rows, *(_row(measured, arm, reference, arm) for arm in measured.arms if arm != reference)])


def ratios_of(measured: Measured, arm: str) -> str:
    """The arm over everybody else, over the best fixed setting and over the best peer of each workload."""
    rows = [[f"{arm} / arm", *measured.columns]]
    others = [OFF, *measured.of_kind(FIXED), *measured.of_kind(PEER)]
    rest = [other for other in measured.arms if other not in (*others, arm)]
    rows += [_row(measured, arm, other, other) for other in [*others, *rest] if other in measured.arms]
    for label, kind in (("best fixed", FIXED), ("best peer", PEER)):
        if kinds := measured.of_kind(kind):
            rows.append([label, *(_against_best(measured, arm, kinds, column) for column in measured.columns)])
    return markdown(rows)


def _row(measured: Measured, arm: str, other: str, label: str) -> list[str]:
    return [label, *(_ratio(measured.ratio(arm, other, column)) for column in measured.columns)]


def _against_best(measured: Measured, arm: str, others: Sequence[str], column: str) -> str:
    best = measured.best(others, column)
    return "-" if best is None else f"{_ratio(measured.ratio(arm, best, column))} ({best})"


Goal = tuple[str, str, float]  # against whom ("off", "fixed", "peer"), column, at least


def _goals(columns: Sequence[str]) -> list[Goal]:
    """What issue 3 asks of goodput on the CPU machine, for the columns that were measured."""
    least = {"copy": 2.0, "open": 1.2, "open again": 4.0, "copy again": 4.0, "math again": 4.0}
    found = [("off", column, least[column]) for column in columns if column in least]
    for column in columns:
        if column.endswith(" streams"):
            found += [("off", column, 0.97), ("fixed", column, 0.97)]
        if column.endswith(" streams") or column == "copy":
            found.append(("peer", column, 1.0))
    return found


def goals(measured: Measured) -> str:
    """Each goal with what was measured. Without a figure there is no verdict."""
    whom: dict[str, Callable[[str], str | None]] = {
        "off": lambda column: OFF,
        "fixed": lambda column: measured.best(measured.of_kind(FIXED), column),
        "peer": lambda column: measured.best(measured.of_kind(PEER), column),
    }
    rows = [["goal", "against", "at least", "measured", "met"]]
    for kind, column, least in _goals(measured.columns):
        other = whom[kind](column)
        ratio = measured.ratio(GOODPUT, other, column) if other else (math.nan, True)
        met = "-" if math.isnan(ratio[0]) else "yes" if ratio[0] >= least else "no"
        label = "off" if kind == "off" else f"best {kind}" + (f" ({other})" if other else "")
        rows.append([column, label, f"{least:g}", _ratio(ratio), met])
    return markdown(rows) if len(rows) > 1 else ""


def equality(measured: Measured, reference: str) -> str:
    """How many greedy answers of each arm are letter for letter those of the reference, where both were asked alone.

    The reference's first answer to a prompt counts; ones of its own that differ from round to round are counted too.
    """
    expected: dict[str, str] = {}
    for record in measured.records:
        if record.arm == reference:
            for key, text in record.texts.items():
                expected.setdefault(key, text)
    lines = []
    for arm in measured.arms:
        pairs = [
            (text, expected[key])
            for record in measured.records
            if record.arm == arm
            for key, text in record.texts.items()
            if key in expected
        ]
        if pairs:
            same = sum(text == answer for text, answer in pairs)
            lines.append(f"{arm}: {same} of {len(pairs)} answers equal those of {reference}")
    return "\n".join(lines)


def _ratio(ratio: tuple[float, bool]) -> str:
    value, paired = ratio
    return "-" if math.isnan(value) else f"{'' if paired else '~'}{value:.2f}"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
