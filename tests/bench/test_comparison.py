"""What is made of the records: what is paired with what, what is called the best, and what is said of answers that differ."""

from __future__ import annotations

import math

import pytest

from bench.arms import FIXED, GOODPUT, OFF, OTHER_WEIGHTS, OURS, PEER
from bench.comparison import Measured, Record, equality, report
from bench.summary import Numbers


def numbers(rate: float, errors: int = 0) -> Numbers:
    return {"decode_rate": rate, "total_rate": rate, "errors": errors, "client_cpu_share": 0.01}


def record(
    arm: str, number: int = 1, kind: str = OURS, run: str = "a", texts: dict[str, str] | None = None, **rates: float
) -> Record:
    """One start; `streams_4=7` stands for "4 streams", `open_again` for "open again"."""
    names = {key: " ".join(reversed(key.split("_"))) if key.startswith("streams") else key.replace("_", " ") for key in rates}
    return Record(arm, kind, run, number, 2.0, 500.0, {names[key]: numbers(rate) for key, rate in rates.items()}, texts or {})


def rows(text: str, label: str) -> list[dict[str, str]]:
    """Every table row that begins with `label`, by the headings of its table."""
    found = []
    headings: list[str] = []
    previous = ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not previous.startswith("|"):
            headings = cells
        if cells and cells[0] == label:
            found.append(dict(zip(headings, cells, strict=True)))
        previous = line
    return found


def test_ratios_are_paired_within_a_round() -> None:
    # The machine was half as fast in round 2, and its peer failed in round 3.
    ours = [record(GOODPUT, n, open=rate) for n, rate in ((1, 100), (2, 50), (3, 400))]
    peer = [record("peer", n, PEER, open=rate) for n, rate in ((1, 50), (2, 25))]
    broken = record("peer", 3, PEER)
    broken.workloads["open"] = numbers(1, errors=1)
    text = report([*ours, *peer, broken])
    assert rows(text, "peer")[0]["open"] == "37.5"
    assert rows(text, "peer")[1]["open"] == "2.00"


def test_rounds_of_different_runs_are_not_paired() -> None:
    measured = Measured(
        [record(GOODPUT, 1, run="a", open=100), record(OFF, 1, run="b", open=50), record(OFF, 2, run="b", open=10)]
    )
    assert measured.ratio(GOODPUT, OFF, "open") == (pytest.approx(100 / 30), False)
    assert "~3.33" in report(measured.records)


def test_parts_of_a_comparison_are_put_together() -> None:
    parts = [
        record(OFF, 1, run="a", open=50),
        record(OFF, 1, run="a", streams_4=100),
        record(GOODPUT, 1, run="a", open=100),
        record(GOODPUT, 1, run="a", streams_4=110),
        record(OFF, 1, run="b", open=5),
        record("peer", 1, PEER, run="b", open=20),
    ]
    text = report(parts)
    assert rows(text, GOODPUT)[1] == {"arm / outrider, off": GOODPUT, "open": "2.00", "4 streams": "1.10"}
    assert rows(text, "peer")[1]["open"] == "4.00"
    assert rows(text, "peer")[1]["4 streams"] == "-"


def test_the_best_is_chosen_per_workload_and_among_equal_weights() -> None:
    found = [
        record(GOODPUT, open=100, copy=300),
        record(OFF, open=80, copy=60),
        record("ngram 4", kind=FIXED, open=90, copy=200),
        record("ngram 16", kind=FIXED, open=50, copy=400),
        record("peer", kind=PEER, open=125, copy=100),
        record("small peer", kind=OTHER_WEIGHTS, open=1000, copy=1000),
    ]
    text = report(found)
    assert rows(text, "best fixed")[0]["open"] == "1.11 (ngram 4)"
    assert rows(text, "best fixed")[0]["copy"] == "0.75 (ngram 16)"
    assert rows(text, "best peer")[0]["open"] == "0.80 (peer)"
    assert rows(text, "small peer")[-1]["open"] == "0.10"  # shown all the same


def test_goals_are_judged_only_on_figures() -> None:
    found = [
        record(GOODPUT, copy=300, streams_16=96),
        record(OFF, copy=100, streams_16=100),
        record("peer", kind=PEER, copy=299),
    ]
    lines = [line for line in report(found).splitlines() if line.rstrip(" |").endswith((" yes", " no", " -"))]
    verdicts = {tuple(cell.strip() for cell in line.split("|")[1:3]): line.split("|")[-2].strip() for line in lines}
    assert verdicts[("copy", "off")] == "yes"
    assert verdicts[("16 streams", "off")] == "no"
    assert verdicts[("copy", "best peer (peer)")] == "yes"
    assert verdicts[("16 streams", "best fixed")] == "-"
    assert verdicts[("16 streams", "best peer")] == "-"


def test_a_second_asking_counts_decoding_and_the_whole() -> None:
    found = record(OFF, open_again=1)
    found.workloads["open again"] = numbers(500) | {"total_rate": 90}
    row = rows(report([found]), OFF)[0]
    assert (row["open again"], row["open again, whole"]) == ("500.0", "90.0")


def test_a_workload_with_errors_has_no_figure() -> None:
    broken = record(OFF, streams_4=1)
    broken.workloads["open"] = numbers(9, errors=1)
    row = rows(report([broken]), OFF)[0]
    assert (row["open"], row["4 streams"]) == ("-", "1.0")
    assert math.isnan(Measured([broken]).value(OFF, "open"))


def test_answers_that_differ_are_counted() -> None:
    found = [
        record(OFF, texts={"a": "x", "b": "y"}),
        record(OFF, 2, texts={"a": "x", "b": "other"}),
        record("peer", texts={"a": "x", "b": "z", "c": "only here"}),
    ]
    text = equality(Measured(found), OFF)
    assert "peer: 1 of 2 answers equal those of outrider, off" in text
    assert "outrider, off: 3 of 4" in text


def test_the_dearest_start_shows_its_memory() -> None:
    small, large = record(OFF, open=1), record(OFF, streams_4=1)
    large.peak_mb = 900.0
    assert rows(report([small, large]), OFF)[0]["peak MB"] == "900"


def test_a_record_comes_back_from_its_line() -> None:
    line = {
        "time": "now",
        "commit": "abc",
        "arm": OFF,
        "kind": OURS,
        "run": "r",
        "round": 2,
        "start_seconds": 1.0,
        "peak_mb": 2.0,
    }
    assert Record.read(line | {"workloads": {"open": numbers(5)}, "texts": {}}).workloads["open"]["decode_rate"] == 5
