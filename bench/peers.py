"""Outrider against its peers on this machine, by the same client in the same run: `python -m bench.peers run MODEL.gguf`.

`install llama.cpp` builds that server first, outside the repository. `run` starts each arm in turn, asks it every workload
(bench.workloads), ends it, and does so three times over, so that a machine that drifts hurts all arms alike. It prints the
medians and, paired within each round, how many times as fast Outrider without speculation is; all numbers go to bench/out/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import llama_cpp, process
from bench.arithmetic import Answer
from bench.arms import REFERENCE, Arm, arms, running
from bench.comparison import Round, report
from bench.load import Ask
from bench.prompts import OWN, load
from bench.serve import OUT, Level, append, first_model, measure
from bench.summary import Numbers
from bench.workloads import WORKLOADS, Workload

FOLDER = Path.home() / ".cache" / "outrider-peers"
TRANSFORMERS = "transformers generate"


def drive(arm: Arm, workloads: Sequence[Workload], log: Path) -> Round:
    with running(arm, log) as server:
        model = first_model(server.endpoint)
        measure(server.endpoint, Ask(model, max_tokens=16), load(OWN, ["open"])[-2:], Level())  # warm-up
        done: dict[str, Numbers] = {}
        texts: dict[str, str] = {}
        for workload in workloads:
            if workload.name not in arm.workloads:
                continue
            ask = Ask(model, workload.max_tokens, ignore_eos=workload.ignore_eos, prediction=arm.prediction)
            level = Level(workload.concurrency, requests=workload.requests)
            numbers, run = measure(server.endpoint, ask, workload.prompts(), level, pids=[server.pid])
            done[workload.name] = numbers
            if workload.concurrency == 1:
                texts |= {f"{workload.name}/{answer.prompt_id}": answer.text for answer in run.answers}
            _complain(arm.name, run.answers)
        return Round(server.start_seconds, process.peak_megabytes([server.pid]), done, texts)


def generate(folder: Path) -> Round:
    """transformers in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-m", "bench.generate", str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    return Round(**json.loads(finished.stdout.splitlines()[-1]))


def _complain(arm: str, answers: Sequence[Answer]) -> None:
    for error in sorted({answer.error for answer in answers if answer.error})[:3]:
        print(f"{arm}: {error}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__, allow_abbrev=False)
    parser.add_argument("--dir", type=Path, default=FOLDER, help="where peers are built (default: ~/.cache/outrider-peers)")
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="build a peer")
    install.add_argument("peer", choices=["llama.cpp"])
    install.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    run = commands.add_parser("run", help="measure all arms")
    run.add_argument("model", type=Path, help="GGUF file that Outrider serves and llama.cpp gets a bf16 copy of")
    run.add_argument("--hf", type=Path, help="the same model as a Hugging Face directory, for transformers")
    run.add_argument("--arm", action="append", help="only arms whose name contains this; may be repeated")
    run.add_argument("--workload", action="append", help="only these; may be repeated")
    run.add_argument("--repeat", type=int, default=3)
    run.add_argument("--slots", type=int, default=32, help="of llama.cpp's server; each takes memory from the start")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "install":
        print(llama_cpp.install(options.dir, options.jobs))
        return 0
    workloads = [w for w in WORKLOADS if not options.workload or w.name in options.workload]
    chosen = [arm for arm in arms(options.model, options.dir, options.slots) if _wanted(arm.name, options.arm)]
    rounds: dict[str, list[Round]] = {arm.name: [] for arm in chosen}
    OUT.mkdir(exist_ok=True)
    if options.hf and _wanted(TRANSFORMERS, options.arm):
        rounds[TRANSFORMERS] = []
    for number in range(1, options.repeat + 1):
        for arm in chosen:
            print(f"round {number}: {arm.name}", file=sys.stderr)
            rounds[arm.name].append(drive(arm, workloads, OUT / "peers.log"))
        if TRANSFORMERS in rounds:
            print(f"round {number}: {TRANSFORMERS}", file=sys.stderr)
            rounds[TRANSFORMERS].append(generate(options.hf))
    print(report(rounds, REFERENCE))
    numbers = {arm: [[one.start_seconds, one.peak_mb, one.workloads] for one in done] for arm, done in rounds.items()}
    print(f"record: {append('peers', {'slots': options.slots, 'rounds': numbers})}")
    return 0


def _wanted(name: str, parts: list[str] | None) -> bool:
    return not parts or any(part in name for part in parts)


if __name__ == "__main__":
    sys.exit(main())
