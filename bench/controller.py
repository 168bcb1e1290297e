"""Does the policy choose well? Every policy on the same answers and simulated machines: `python -m bench.controller`.

Policies: off, fixed lengths, one length for the batch by global acceptance (SmartSpec's), the engine's own `goodput`, and an
oracle that knows which drafts will stand. Loads: so many requests at a time, Poisson arrivals at shares of what the machine can
do without drafts, or waves (bench/waves.py): one run whose load changes. Machines: formulas and this project's measured CPU
table (bench/hardware.py). It all is a simulation (bench/simulation.py): the scheduler, drafters and policies are the engine's,
the model and its time are not.

    python -m bench.controller                            made-up answers, half of them copying
    python -m bench.controller --data ../shared/data      stretches of real texts
    python -m bench.controller --recording FILE           what `bench.replay record` kept
    python -m bench.controller --waves                    one run through spikes and drains instead of fixed loads
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import hardware, traces
from bench.hardware import Stairs, Table
from bench.picture import draw_budget, draw_goodput
from bench.recording import Recorded, read
from bench.rivals import OraclePolicy, UniformPolicy
from bench.serve import append, numbers_list
from bench.simulation import Hardware, Outcome, ReplayExecutor, Simulation, World, make_info
from bench.summary import markdown
from bench.waves import WAVES, Wave, total, waves
from engine.cost import CostModel, guess
from engine.profile import Profile
from engine.protocols import Policy
from engine.registry import make_drafter, make_policy

OUT = Path(__file__).with_name("out")
MAX_BUDGET = 16
FIXED = (1, 2, 4, 8, 16)
LOADS = (1, 4, 8, 16, 32, 64)
SHARES = (0.3, 0.6, 0.9)  # of the rate at which requests can be served without drafts
PROFILE_SECONDS = 1.0
PER_LOAD = 6  # requests for each that is in flight, but at least LEAST in all
LEAST = 64


@dataclass(frozen=True, slots=True)
class Arm:
    """A policy under test. `budget`: of the fixed one."""

    name: str
    policy: str
    budget: int = 0
    profiled: bool = True  # False: its cost model begins with a guess


OFF = Arm("off", "off")
GOODPUT, GUESSING = Arm("goodput", "goodput"), Arm("goodput, no profile", "goodput", profiled=False)
UNIFORM, ORACLE = Arm("uniform", "uniform"), Arm("oracle", "oracle")


def fixed(lengths: Iterable[int] = FIXED) -> list[Arm]:
    return [Arm(f"fixed {k}", "fixed", k) for k in lengths]


def arms(lengths: Iterable[int] = FIXED) -> list[Arm]:
    return [OFF, *fixed(lengths), UNIFORM, GOODPUT, GUESSING, ORACLE]


def simulate(
    arm: Arm, machine: Hardware, drafters: Sequence[str] = ("ngram",), seed: int = 0, noise: float = 0.03, stalls: float = 0.002
) -> Simulation:
    """A fresh engine for one arm. Its cost model is profiled for a second of the machine's time, as a server's would be."""
    world = World(machine, noise=noise, stalls=stalls, seed=seed)
    executor = ReplayExecutor(make_info(), [make_drafter(name) for name in drafters], world)
    return Simulation(_policy(arm, executor, drafters), executor)


def _policy(arm: Arm, executor: ReplayExecutor, drafters: Sequence[str]) -> Policy:
    world = executor.world
    if arm.policy == "oracle":
        return OraclePolicy(world.hardware, executor.answers, MAX_BUDGET)
    if arm.policy in ("off", "fixed"):
        return make_policy(arm.policy, budget=arm.budget)
    profile = Profile(executor.info)
    if arm.profiled:
        profile.measure(world.probe, PROFILE_SECONDS, world.clock)
    # Sizes that steps are padded to are known to an executor, as they are its own doing.
    tier = world.hardware.padded if isinstance(world.hardware, Stairs) else None
    cost = CostModel(profile.tables() if arm.profiled else guess(executor.info), tier)
    if arm.policy == "uniform":
        return UniformPolicy(cost, MAX_BUDGET)
    return make_policy("goodput", cost=cost, max_budget=MAX_BUDGET, drafters=list(drafters))


def closed(
    recorded: Sequence[Recorded],
    machine: Hardware,
    load: int,
    chosen: Iterable[Arm],
    drafters: Sequence[str],
    seeds: int = 1,
    count: int | None = None,
) -> dict[str, Outcome]:
    """Every arm with `load` requests at a time, `count` in all, by name; tokens and seconds of several seeds are added up."""
    count = count or max(LEAST, PER_LOAD * load)
    asked = [recorded[i % len(recorded)] for i in range(count)]
    return {arm.name: _sum(simulate(arm, machine, drafters, seed).closed(asked, load) for seed in range(seeds)) for arm in chosen}


def waved(
    recorded: Sequence[Recorded],
    machine: Hardware,
    schedule: Sequence[Wave],
    chosen: Iterable[Arm],
    drafters: Sequence[str] = ("ngram",),
    seeds: int = 1,
) -> dict[str, Outcome]:
    """Every arm with the same requests in waves, by name: a server through spikes and drains. Each seed has another order."""
    asked = [recorded[i % len(recorded)] for i in range(total(schedule))]
    orders = [random.Random(seed).sample(asked, len(asked)) for seed in range(seeds)]
    return {
        arm.name: _sum(simulate(arm, machine, drafters, seed).waves(order, schedule) for seed, order in enumerate(orders))
        for arm in chosen
    }


def _sum(outcomes: Iterable[Outcome]) -> Outcome:
    first, *rest = outcomes
    for other in rest:
        first.tokens += other.tokens
        first.busy += other.busy
        first.drafted += other.drafted
        first.accepted += other.accepted
        first.served += other.served
    return first


def best_fixed(found: Mapping[str, Outcome]) -> float:
    """The goodput of the best choice that does not look: off, or any fixed length."""
    return max(outcome.goodput for name, outcome in found.items() if name == "off" or name.startswith("fixed"))


def poisson(
    recorded: Sequence[Recorded], machine: Hardware, shares: Iterable[float], drafters: Sequence[str], count: int = 200
) -> list[list[str]]:
    """Rows of a table: tokens per busy second and milliseconds per token, for arrivals at shares of what off can serve.

    Arrivals decide how many tokens there are; what a policy can do is to give them sooner. A faster one has smaller batches, so
    its tokens per busy second need not be more.
    """
    asked = [recorded[i % len(recorded)] for i in range(count)]
    full = simulate(OFF, machine, drafters).closed(asked, min(64, count // 3))
    capacity = full.goodput / (sum(len(one.answer) for one in asked) / count)  # requests per second
    rows = []
    for share in shares:
        for arm in (OFF, *fixed((2, 4, 8)), UNIFORM, GOODPUT, ORACLE):
            outcome = simulate(arm, machine, drafters).open(asked, share * capacity)
            tpot = [f"{1000 * outcome.tpot(p):.1f}" for p in (10, 50, 90, 99)]
            rows.append([machine.name, f"{share:g}", arm.name, f"{outcome.goodput:.0f}", *tpot, _acceptance(outcome)])
    return rows


def _acceptance(outcome: Outcome) -> str:
    return f"{outcome.accepted / outcome.drafted:.2f}" if outcome.drafted else "-"


def _machines(names: Iterable[str], table: Path) -> list[Hardware]:
    known: dict[str, Hardware] = {
        machine.name: machine for machine in (hardware.GPU, hardware.GPU_STAIRS, hardware.SMALL, hardware.SMALL_STAIRS)
    }
    return [known[name] if name in known else Table(table, name) for name in names]


def _recorded(options: argparse.Namespace) -> list[Recorded]:
    if options.recording is not None:
        return read(options.recording)
    count = total(options.waves) if options.waves else max(LEAST, PER_LOAD * max(options.loads))
    if options.data is not None:
        return traces.real(options.data, count, options.copy_share)
    return traces.synthetic(count, options.copy_share)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.controller", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--data", type=Path, help="folder of real texts (shared/data); default: made-up answers")
    add("--recording", type=Path, help="answers of a model, as bench.replay records them")
    add("--copy-share", type=float, default=0.5, help="share of the answers that copy (default: 0.5)")
    add("--machines", default="gpu,gpu stairs,small gpu,small gpu stairs,cpu", help="comma list; cpu is the measured table")
    add("--table", type=Path, default=hardware.MEASURED, help="table of the machine cpu")
    add("--loads", type=numbers_list(int), default=list(LOADS), metavar="N,N", help="requests at a time")
    add("--drafters", default="ngram", help="comma list (default: ngram)")
    add("--seeds", type=int, default=1, help="runs that are added up")
    add("--waves", type=waves, nargs="?", const=WAVES, metavar="NxM,NxM", help=f"N at a time for M requests, ... ({WAVES})")
    add("--no-poisson", action="store_true", help="leave the Poisson arrivals out")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    recorded = _recorded(options)
    print(f"answers: {options.recording or options.data or 'made up'}, {traces.kinds(recorded)}; simulated\n")
    tables, pictures = (_in_waves if options.waves else _under_load)(options, recorded)
    print("\n\n".join(markdown(rows) for rows in tables.values()))
    record = append("controller", {"settings": {k: str(v) for k, v in vars(options).items()}, **tables})
    print(f"\nrecord: {record}; pictures: {', '.join(str(picture) for picture in pictures)}")
    return 0


Tables = dict[str, list[list[str]]]


def _under_load(options: argparse.Namespace, recorded: Sequence[Recorded]) -> tuple[Tables, list[Path]]:
    drafters, chosen = options.drafters.split(","), arms()
    machines = _machines(options.machines.split(","), options.table)
    tables = {"rows": [["machine", "at a time", *(arm.name for arm in chosen), "goodput / best fixed"]]}
    late: list[list[str]] = []
    curves: dict[str, dict[str, list[float]]] = {}
    for machine in machines:
        curve = curves.setdefault(machine.name, {arm.name: [] for arm in chosen})
        for load in options.loads:
            found = closed(recorded, machine, load, chosen, drafters, options.seeds)
            rates = [found[arm.name].goodput for arm in chosen]
            ratio = found[GOODPUT.name].goodput / best_fixed(found)
            tables["rows"].append([machine.name, str(load), *(f"{rate:.0f}" for rate in rates), f"{ratio:.3f}"])
            for arm, rate in zip(chosen, rates, strict=True):
                curve[arm.name].append(rate)
        if not options.no_poisson:
            late += poisson(recorded, machine, SHARES, drafters)
    if late:
        head = ["machine", "load", "policy", "tok/s while busy", *(f"TPOT p{p} ms" for p in (10, 50, 90, 99)), "accepted"]
        tables["poisson"] = [head, *late]
    spike = spiked(simulate(GOODPUT, machines[-1], drafters), recorded)
    return tables, [
        draw_goodput(curves, options.loads, OUT / "controller-goodput.png"),
        draw_budget({machines[-1].name: spike}, OUT / "controller-budget.png"),
    ]


def _in_waves(options: argparse.Namespace, recorded: Sequence[Recorded]) -> tuple[Tables, list[Path]]:
    drafters, chosen = options.drafters.split(","), [arm for arm in arms() if arm is not GUESSING]
    rows = [["machine", *(arm.name for arm in chosen), "goodput / best fixed", "oracle / best fixed"]]
    shown: dict[str, Outcome] = {}
    for machine in _machines(options.machines.split(","), options.table):
        found = waved(recorded, machine, options.waves, chosen, drafters, options.seeds)
        best = best_fixed(found)
        ratios = [f"{found[arm.name].goodput / best:.3f}" for arm in (GOODPUT, ORACLE)]
        rows.append([machine.name, *(f"{found[arm.name].goodput:.0f}" for arm in chosen), *ratios])
        shown[machine.name] = found[GOODPUT.name]
    return {"waves": rows}, [draw_budget(shown, OUT / "controller-waves.png")]


def spiked(simulation: Simulation, recorded: Sequence[Recorded]) -> Outcome:
    """One request at a time, then many at once, then one at a time again: what a policy chooses over the time."""
    whole = Outcome()
    few, many = recorded[: max(6, len(recorded) // 16)], recorded[: max(24, len(recorded) // 2)]
    for asked, load in ((few, 1), (many, 32), (few, 1)):
        part = simulation.closed(asked, min(load, len(asked) // 3), whole=True)
        whole.steps += part.steps
    return whole


if __name__ == "__main__":
    sys.exit(main())
