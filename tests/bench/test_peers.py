"""The command line of the comparison: which records a report takes, and what a failed start costs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import driving, peers
from bench.arms import OFF, OURS, Arm
from bench.workloads import Workload, named


def line(run: str, commit: str = "new", arm: str = OFF, part: float = 1.0) -> str:
    known = {"cpu": "x", "cores": 2, "python": "3.11", "model": "m.gguf", "command": "c", "commit": commit, "part": part}
    numbers = {"errors": 0, "decode_rate": 9.0, "total_rate": 9.0, "client_cpu_share": 0.0}
    own = {"arm": arm, "kind": OURS, "run": run, "round": 1, "start_seconds": 1.0, "peak_mb": 1.0, "texts": {}}
    return json.dumps({**known, **own, "workloads": {"open": numbers}})


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(peers, "OUT", tmp_path)
    return tmp_path / "peers.jsonl"


def test_a_report_takes_the_newest_commit(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier = json.dumps({"commit": "older", "rounds": {}})  # another form of record
    out.write_text("\n".join([earlier, line("1", "old"), line("2"), line("3", part=0.5), line("4", arm="peer")]) + "\n")
    head, found = peers.records(None, None)
    assert [record.run for record in found] == ["2", "4"]
    assert "commit: new" in head
    assert [record.run for record in peers.records(None, 0.5)[1]] == ["3"]
    assert [record.run for record in peers.records("1", None)[1]] == ["1", "2", "4"]
    assert peers.main(["report"]) == 0
    assert "peer | ~1.00 |" in capsys.readouterr().out


def test_without_records_there_is_no_report(out: Path) -> None:
    assert peers.main(["report"]) == 1


def test_a_program_that_measures_itself_leaves_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, object]] = []
    monkeypatch.setattr(driving, "OUT", tmp_path)
    monkeypatch.setattr(driving, "LOG", tmp_path / "log")
    monkeypatch.setattr(driving, "append", lambda name, record: written.append(record))

    def program(workloads: object, part: float) -> list[str]:
        result = {"start_seconds": part, "peak_mb": 5, "workloads": {"open": {}}, "texts": {"open/1": "a"}}
        return [sys.executable, "-c", f"print('loading'); print({json.dumps(result)!r})"]

    fine = Arm("fine", OURS, program=program)
    failing = Arm("failing", OURS, program=lambda workloads, part: [sys.executable, "-c", "raise SystemExit('no memory')"])
    missing = Arm("missing", OURS, command=lambda port: ["/nowhere/server"])
    silent = Arm("silent", OURS, program=lambda workloads, part: [sys.executable, "-c", ""])
    elsewhere = Arm("elsewhere", OURS, program=program, workloads=("copy",))
    groups = [[named("open")]]
    assert driving.compare([fine, failing, missing, silent, elsewhere], groups, 2, 0.5, {"slots": 4}) == 6
    assert [(one["arm"], one["round"], one["start_seconds"], one["slots"]) for one in written] == [
        ("fine", 1, 0.5, 4),
        ("fine", 2, 0.5, 4),
    ]
    assert written[0]["texts"] == {"open/1": "a"}
    assert "no memory" in (tmp_path / "log").read_text()


def test_arms_take_turns_and_turn_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(driving, "OUT", tmp_path)
    monkeypatch.setattr(driving, "append", lambda name, record: None)

    def execute(arm: Arm, workloads: list[Workload], part: float) -> driving.Outcome:
        order.append(arm.name + workloads[0].name)
        return 0.0, 0.0, {}, {}

    monkeypatch.setattr(driving, "execute", execute)
    arms = [Arm(name, OURS, program=lambda workloads, part: []) for name in "ab"]
    driving.compare(arms, [[named("open")], [named("4 streams")]], 2, 1.0, {})
    assert order == ["aopen", "bopen", "a4 streams", "b4 streams", "bopen", "aopen", "b4 streams", "a4 streams"]
