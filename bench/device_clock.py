"""Times what runs on a CUDA device, and what that device can do at most: the ceilings that every figure of a run is held against.

A call is captured in a CUDA graph where it can be, so that what is timed is the device's work and not Python's; CUDA events stand
around each replay, and before each the L2 cache is overwritten. Medians. The ceilings come from the same clock in the same run:
a copy of 2 GiB, bytes read plus bytes written, and a square matrix product of random numbers.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from bench.arithmetic import median

WARMUP = 3
BURST = 5  # repeats between two looks at the host's clock
COPIED = 2 << 30  # bytes
SIDE = 8192  # of the matrices


@dataclass(frozen=True, slots=True)
class Arm:
    """What is timed, and what has to happen before each time (and is not)."""

    call: Callable[[], object]
    prepare: Callable[[], object] | None = None


class Clock(Protocol):
    def seconds(self, arm: Arm) -> float: ...


@dataclass(frozen=True, slots=True)
class Ceilings:
    copy: float  # bytes per second, read and written
    matrix: float  # operations per second
    launch: float  # seconds that this clock sees when nearly nothing is done


class DeviceClock:
    """The median of `least` to `most` repeats, as many as fit into `budget` seconds."""

    def __init__(self, device: torch.device, least: int = 10, most: int = 50, budget: float = 0.15) -> None:
        cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
        self._flushed = torch.empty(max(4 * cache, 256 << 20), dtype=torch.int8, device=device)
        self.least, self.most, self.budget = least, most, budget

    def seconds(self, arm: Arm) -> float:
        """Raises whatever the call raises."""
        call = _captured(arm)
        times: list[float] = []
        started = time.perf_counter()
        while len(times) < self.least or (len(times) < self.most and time.perf_counter() - started < self.budget):
            times += self._burst(call, arm.prepare)
        return median(times)

    def _burst(self, call: Callable[[], object], prepare: Callable[[], object] | None) -> list[float]:
        pairs = []
        for _ in range(BURST):
            if prepare is not None:
                prepare()
            self._flushed.zero_()  # long enough, too, for the host to be ahead when the first event comes
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            pairs.append((begin, end))
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]


def _captured(arm: Arm) -> Callable[[], object]:
    """A replay of the call, or the call itself where it cannot be captured; compiled and warm either way."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUP):
            if arm.prepare is not None:
                arm.prepare()
            arm.call()
        waits = _waits(arm.call)
    torch.cuda.synchronize()
    if waits:
        return arm.call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # a capture that fails would leave another one behind
        try:
            with torch.cuda.graph(graph):
                arm.call()
        except RuntimeError:
            torch.cuda.synchronize()
            return arm.call
    return graph.replay


def _waits(call: Callable[[], object]) -> bool:
    """Whether torch waits for the device in it. Asked beforehand: a capture that fails leaves torch's allocator out of order."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return False


def ceilings(
    clock: Clock, device: torch.device, dtype: torch.dtype = torch.bfloat16, copied: int = COPIED, side: int = SIDE
) -> Ceilings:
    """Measured on this device now; the matrices first, so that its clocks are up when the copy's turn comes."""
    matrix = 2 * side**3 / _product(clock, device, dtype, side)
    copy = 2 * copied / _copy(clock, device, copied)
    one = torch.zeros(1, device=device)
    return Ceilings(copy, matrix, clock.seconds(Arm(lambda: one.add_(1))))


def _product(clock: Clock, device: torch.device, dtype: torch.dtype, side: int) -> float:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return clock.seconds(Arm(lambda: a @ b))


def _copy(clock: Clock, device: torch.device, size: int) -> float:
    source = torch.empty(size // 2, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    return clock.seconds(Arm(lambda: target.copy_(source)))


def describe(device: torch.device) -> dict[str, str]:
    """The device and what drives it."""
    found = torch.cuda.get_device_properties(device)
    return {
        "gpu": f"{found.name}, {found.total_memory >> 20} MiB, {found.multi_processor_count} multiprocessors",
        "cuda": str(torch.version.cuda),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "flashinfer": _version("flashinfer-python"),
    }


def _version(distribution: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "absent"
