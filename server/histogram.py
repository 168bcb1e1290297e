"""A histogram for one event loop: no lock, and k equal observations cost as much as one. Exported by `metrics`."""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate, pairwise

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.utils import floatToGoString


class Histogram:
    """`bounds` are upper limits, inclusive, in rising order; what lies above the last is counted under +Inf."""

    __slots__ = ("bounds", "counts", "help", "name", "total")

    def __init__(self, name: str, help_text: str, bounds: tuple[float, ...]) -> None:
        if any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"the bounds of {name} do not rise")
        self.name = name
        self.help = help_text
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += count
        self.total += value * count

    @property
    def count(self) -> int:
        return sum(self.counts)

    def family(self, labels: dict[str, str]) -> HistogramMetricFamily:
        family = HistogramMetricFamily(self.name, self.help, labels=list(labels))
        limits = map(floatToGoString, (*self.bounds, math.inf))
        family.add_metric(list(labels.values()), list(zip(limits, accumulate(self.counts), strict=True)), self.total)
        return family
