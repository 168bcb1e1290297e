"""What the Triton kernels reach on a GPU: `python -m bench.kernels` (or `--quick`: two minutes).

TB/s and TFLOP/s of every kernel, as shares of the copy bandwidth and the matrix rate that the same device showed in the same
run; beside it torch's own operators and, for attention, flashinfer where it is installed. One Markdown table per kernel, and
everything as one JSON line in bench/out/kernels.jsonl. What no time was left for is named, never guessed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from bench.device_clock import Ceilings, Clock, DeviceClock, ceilings, describe
from bench.kernel_case import FIXED, OWN, Case, Maker, Measured, Sizes, table
from bench.serve import OUT, append, numbers_list
from bench.shapes import SHAPES
from bench.summary import markdown

KERNELS = ("attention", "others")
OURS = (OWN, FIXED)
FULL = {
    "batch": [1, 8, 32, 64, 256], "context": [128, 1024, 4096, 32768], "nodes": [0, 4, 8, 16, 64],
    "rows": [1, 4, 8, 16, 64, 256, 512],
}  # fmt: skip
QUICK = {"batch": [1, 8, 32], "context": [4096], "nodes": [0, 8, 16], "rows": [1, 8, 64]}
MOST_TOKENS = {False: 4 << 20, True: 1 << 20}  # of one attention case: 17 GB of keys and values of the 8B shape
SECONDS = {False: 540.0, True: 110.0}


@dataclass(slots=True)
class Report:
    """What was measured, what could not be run, and what the time did not suffice for."""

    most: Ceilings
    measured: list[Measured] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)  # of ours
    refused: list[str] = field(default_factory=list)  # by those it is compared with
    left_out: list[str] = field(default_factory=list)

    def text(self) -> str:
        copy, matrix, launch = self.most.copy / 1e12, self.most.matrix / 1e12, self.most.launch * 1e6
        parts = [f"copy {copy:.2f} TB/s (read + written), product {matrix:.0f} TFLOP/s, an empty launch {launch:.1f} us"]
        for kernel in dict.fromkeys(one.case.kernel for one in self.measured):
            own = [one for one in self.measured if one.case.kernel == kernel]
            parts.append(f"### {kernel}\n\n{markdown(table(own, self.most))}")
        parts += [f"could not run: {line}" for line in [*self.failures, *self.refused]]
        if self.left_out:
            parts.append(f"not measured, the time was over: {', '.join(self.left_out)}")
        return "\n\n".join(parts)


def measure(
    makers: Iterable[Maker], clock: Clock, most: Ceilings, until: float, now: Callable[[], float] = time.monotonic
) -> Report:
    """Every case that can be begun before `until`. One that fails is reported, and the others go on."""
    report = Report(most)
    for make in makers:
        name = _name(make)
        if now() >= until:
            report.left_out.append(name)
            continue
        try:
            case = make()
        except (RuntimeError, ValueError, AssertionError) as error:
            report.failures.append(f"{name}: {_first_line(error)}")
            continue
        seconds = {arm: _time(case, arm, clock, report) for arm in case.arms}
        if not math.isnan(seconds[OWN]):
            report.measured.append(Measured(replace(case, arms={}), seconds))
    return report


def _time(case: Case, arm: str, clock: Clock, report: Report) -> float:
    """NaN for an arm that cannot run here, which is said."""
    try:
        return clock.seconds(case.arms[arm])
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:  # a peer has ideas of its own about what it takes
        shape = ", ".join(f"{key} {value}" for key, value in case.shape.items())
        complaints = report.failures if arm in OURS else report.refused
        complaints.append(f"{arm}, {case.kernel} ({shape}): {_first_line(error)}")
        return math.nan


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _name(make: Maker) -> str:
    function, arguments = getattr(make, "func", make), getattr(make, "args", ())
    return f"{function.__name__}({', '.join(str(a) for a in arguments if isinstance(a, int | str))})"


def sizes_of(options: argparse.Namespace) -> list[Sizes]:
    """What was asked for, by model shape."""
    default = QUICK if options.quick else FULL
    asked = {name: getattr(options, name) or default[name] for name in default}
    models = options.shape or (["llama-3.1-8b"] if options.quick else ["llama-3.1-8b", "llama-3.2-1b"])
    return [
        Sizes(
            name, SHAPES[name], asked["batch"], asked["context"], asked["nodes"], asked["rows"], MOST_TOKENS[options.quick],
            getattr(torch, options.dtype),
        )
        for name in models
    ]  # fmt: skip


def cases(sizes: Sequence[Sizes], kinds: Sequence[str], device: torch.device) -> Iterable[Maker]:
    from bench import attention_cases, kernel_cases  # they import triton, which is missed only where there is no GPU either

    for one in sizes:
        if "attention" in kinds:
            yield from attention_cases.makers(one, device)
        if "others" in kinds:
            yield from kernel_cases.makers(one, device)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--quick", action="store_true", help="few shapes of one model, two minutes")
    add("--kernel", action="append", choices=KERNELS, help="only these; may be repeated")
    add("--shape", action="append", choices=sorted(SHAPES), help="model shapes; may be repeated")
    for name, what in {"batch": "sequences", "context": "tokens", "nodes": "draft nodes", "rows": "rows of a step"}.items():
        add(f"--{name}", type=numbers_list(int), metavar="N,N", help=what)
    add("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    add("--seconds", type=float, help="no case is begun after so many (default: 540, --quick 110)")
    add("--out", type=Path, default=OUT, help="folder of the record")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    options = _parser().parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.kernels: there is no CUDA device here, and these figures are of nothing else", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    clock = DeviceClock(device, budget=0.05 if options.quick else 0.15)
    most = ceilings(clock, device, getattr(torch, options.dtype))
    about = describe(device)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    until = started + (options.seconds or SECONDS[options.quick])
    with torch.inference_mode():
        report = measure(cases(sizes_of(options), options.kernel or KERNELS, device), clock, most, until)
    print(report.text())
    settings = {name: str(value) for name, value in vars(options).items()}
    record: dict[str, Any] = {"settings": settings, **about, "ceilings": asdict(most)}
    record |= {name: getattr(report, name) for name in ("failures", "refused", "left_out")}
    record["cases"] = [one.record() for one in report.measured]
    print(f"record: {append('kernels', record, options.out)}")
    return 1 if report.failures or not report.measured else 0


if __name__ == "__main__":
    sys.exit(main())
