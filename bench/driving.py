"""Drives the arms of a comparison through the groups of workloads, one start at a time; every start leaves a record."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from bench import process
from bench.arithmetic import Answer
from bench.arms import Arm, running
from bench.comparison import Record
from bench.load import Ask
from bench.serve import OUT, Level, append, first_model, measure
from bench.summary import Numbers
from bench.workloads import Workload, warm_up

LOG = OUT / "peers.log"

Outcome = tuple[float, float, dict[str, Numbers], dict[str, str]]  # start seconds, peak MB, numbers, texts


def serve(arm: Arm, workloads: Sequence[Workload]) -> Outcome:
    """Start the arm's server, ask it the workloads in turn, end it."""
    with running(arm, LOG) as server:
        model = first_model(server.endpoint)

        def ask(workload: Workload) -> tuple[Numbers, list[Answer]]:
            how = Ask(model, workload.max_tokens, ignore_eos=workload.ignore_eos, prediction=arm.prediction)
            level = Level(workload.concurrency, requests=workload.requests)
            numbers, run = measure(server.endpoint, how, workload.prompts(), level, pids=[server.pid])
            _complain(arm.name, run.answers)
            return numbers, run.answers

        ask(warm_up(max(workload.concurrency for workload in workloads)))
        done: dict[str, Numbers] = {}
        texts: dict[str, str] = {}
        for workload in workloads:
            done[workload.name], answers = ask(workload)
            if workload.concurrency == 1:
                texts |= {f"{workload.name}/{answer.prompt_id}": answer.text for answer in answers}
        return server.start_seconds, process.peak_megabytes([server.pid]), done, texts


def execute(arm: Arm, workloads: Sequence[Workload], part: float) -> Outcome:
    """Let the arm measure itself. Raises RuntimeError, naming the log, when it fails."""
    if arm.program is None:
        raise ValueError(f"{arm.name} is a server")
    command = arm.program([workload.name for workload in workloads], part)
    with LOG.open("ab") as log:
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | arm.variables())
    if finished.returncode:
        raise RuntimeError(f"{arm.name} ended with status {finished.returncode}: see {LOG}")
    found = json.loads(finished.stdout.splitlines()[-1])
    return found["start_seconds"], found["peak_mb"], found["workloads"], found.get("texts", {})


def compare(arms: Sequence[Arm], groups: Sequence[Sequence[Workload]], rounds: int, part: float, note: dict[str, Any]) -> int:
    """Run everything, write the records, and answer how many starts failed."""
    OUT.mkdir(exist_ok=True)
    run, failures = time.strftime("%Y-%m-%dT%H:%M:%S"), 0
    note = {**note, "part": part, **process.machine()}  # once: the run has the commit that it began with
    for number in range(1, rounds + 1):
        for group in groups:
            for arm in arms if number % 2 else list(reversed(arms)):
                workloads = [workload.shortened(part) for workload in group if workload.name in arm.workloads]
                if not workloads:
                    continue
                print(f"round {number}: {arm.name}: {', '.join(workload.name for workload in workloads)}", file=sys.stderr)
                try:
                    outcome = serve(arm, workloads) if arm.command else execute(arm, workloads, part)
                except (RuntimeError, OSError, ValueError, LookupError, subprocess.SubprocessError) as error:
                    print(f"{arm.name}: {error}", file=sys.stderr)
                    failures += 1
                    continue
                record = Record(arm.name, arm.kind, run, number, *outcome)
                append("peers", {**note, **{name: getattr(record, name) for name in Record.__dataclass_fields__}})
    return failures


def _complain(arm: str, answers: Sequence[Answer]) -> None:
    for error in sorted({answer.error for answer in answers if answer.error})[:3]:
        print(f"{arm}: {error}", file=sys.stderr)
