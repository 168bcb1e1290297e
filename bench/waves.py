"""Traffic whose load changes in one run: so many requests at a time, then suddenly so many more, then a drain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wave:
    """`requests` come, each as soon as fewer than `at_a_time` are in flight; after a higher wave that waits for a drain."""

    at_a_time: int
    requests: int


# On each simulated machine about as much of the time goes to few at a time as to many.
WAVES = "1x16,64x256,1x16,16x96,4x32,32x128,1x16"


def waves(text: str) -> list[Wave]:
    """`AT_A_TIMExREQUESTS,...`. Raises ValueError."""
    found = []
    for part in text.split(","):
        at_a_time, _, requests = part.partition("x")
        found.append(Wave(int(at_a_time), int(requests)))
    if min(min(wave.at_a_time, wave.requests) for wave in found) < 1:
        raise ValueError(f"waves: at least one request, one at a time: {text}")
    return found


def total(schedule: Sequence[Wave]) -> int:
    return sum(wave.requests for wave in schedule)
