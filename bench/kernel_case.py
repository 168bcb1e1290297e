"""One thing that bench.kernels times: the least that it must do, who does it, and what the times come to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.device_clock import Arm, Ceilings
from engine.models.config import ModelConfig

OWN, FIXED = "triton", "fixed order"


@dataclass(frozen=True, slots=True)
class Case:
    """`bytes`: every input read once and every output written once; `flops`: operations, 2 for a multiplication and an addition.

    `arms`: ours (OWN) first, then whom it is compared with.
    """

    kernel: str
    shape: Mapping[str, int | str]
    bytes: int
    flops: int
    arms: Mapping[str, Arm]

    def floor(self, most: Ceilings) -> float:
        """Seconds below which no version runs on this device."""
        return max(self.bytes / most.copy, self.flops / most.matrix)


Maker = Callable[[], Case]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is timed, of one model's shape."""

    name: str
    model: ModelConfig
    batches: Sequence[int]
    contexts: Sequence[int]
    nodes: Sequence[int]
    rows: Sequence[int]
    most_tokens: int  # of context, in one attention case
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 16


@dataclass(frozen=True, slots=True)
class Measured:
    case: Case
    seconds: Mapping[str, float]  # NaN: that arm could not run

    def record(self) -> dict[str, Any]:
        seconds = {name: None if math.isnan(value) else value for name, value in self.seconds.items()}
        case = self.case
        return {
            "kernel": case.kernel, "shape": dict(case.shape), "bytes": case.bytes, "flops": case.flops, "seconds": seconds
        }  # fmt: skip


FIGURES = ["us", "TB/s", "% of copy", "TFLOP/s", "% of matrix", "% of floor"]


def table(measured: Sequence[Measured], most: Ceilings) -> list[list[str]]:
    """The rows of one kernel, its heading first. `x NAME`: how many times as long as ours that arm took."""
    shape = list(measured[0].case.shape)
    others = list(dict.fromkeys(name for one in measured for name in one.seconds if name != OWN))
    heading = [*shape, *FIGURES, *(cell for name in others for cell in (f"{name} us", f"x {name}"))]
    return [heading, *([*(str(one.case.shape[name]) for name in shape), *_figures(one, others, most)] for one in measured)]


def _figures(one: Measured, others: Sequence[str], most: Ceilings) -> list[str]:
    own, case = one.seconds[OWN], one.case
    cells = [
        _cell(own * 1e6, ".1f"),
        _cell(case.bytes / own / 1e12, ".3f"),
        _cell(100 * case.bytes / own / most.copy, ".0f"),
        _cell(case.flops / own / 1e12, ".1f") if case.flops else "-",
        _cell(100 * case.flops / own / most.matrix, ".0f") if case.flops else "-",
        _cell(100 * case.floor(most) / own, ".0f"),
    ]
    for name in others:
        seconds = one.seconds.get(name, math.nan)
        cells += [_cell(seconds * 1e6, ".1f"), _cell(seconds / own, ".2f")]
    return cells


def _cell(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
