"""Seconds over two axes: a measured table, and corrections of its points learned while the engine runs.

The corrections are ratios measured / predicted. One, the drift, belongs to the whole table (the machine got busy, or a
guess was off everywhere); each point has its own beside it, bounded, so that a wrong lesson cannot turn the table over.
An observation moves the points around it by their share in it, in the logarithm, and never by more than `SHOCK` of
surprise: a step that the operating system put aside for a while weighs no more than one that is a quarter too slow.
Of a table that was measured the fine shape is known best: there an observation moves all points within two octaves of x, the
closer the more. Were it the nearest alone, the sizes that a policy picks most would follow every change of the machine at once
and their neighbours would not: stairs that are not there, which hold the policy where it is.
Source: core.md J.6 (rho <- clip(0.98 rho + 0.02 measured / predicted)).
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RATE = 0.02  # of a point's correction, per observation that lies on it
REACH = 2.0  # octaves of x
DRIFT_RATE = 0.05
SHOCK = 0.25  # most surprise that counts, in the logarithm: a quarter
MEASURED_BOUNDS = (0.7, 1.5)
# Where nothing was measured, it is the shape that is unknown: points move faster, and more, than the whole.
GUESSED_RATE = 0.05
GUESSED_DRIFT_RATE = 0.01
GUESSED_SHOCK = 0.7
GUESSED_BOUNDS = (0.1, 10.0)
WARM_UP = 5  # observations whose median sets the drift of a table that was guessed


class SurfaceTable(msgspec.Struct, kw_only=True):
    """What is kept of a surface: `seconds[i][j]` at xs[i], ys[j], and what was learned about it."""

    xs: list[float]
    ys: list[float]
    seconds: list[list[float]]
    corrections: list[list[float]] = []  # ratios, shaped as `seconds`; empty: none yet
    drift: float = 1.0
    measured: bool = True  # False: guessed, so that corrections have wide bounds


class Surface:
    """Bilinear between points, flat below the first, along the last slope beyond the last; never decreasing along x.

    Raises ValueError for a table whose axes do not increase or whose numbers are not positive and finite.
    """

    def __init__(self, table: SurfaceTable) -> None:
        self.xs, self.ys = np.asarray(table.xs, dtype=np.float64), np.asarray(table.ys, dtype=np.float64)
        self.seconds = np.asarray(table.seconds, dtype=np.float64)
        shape = (len(self.xs), len(self.ys))
        with np.errstate(divide="ignore", invalid="ignore"):  # what has no logarithm is refused below
            log = np.log(table.corrections) if table.corrections else np.zeros(shape)
        if not (len(self.xs) and len(self.ys)) or self.seconds.shape != shape or log.shape != shape:
            raise ValueError("a cost table's numbers do not fit its axes")
        if (np.diff(self.xs) <= 0).any() or (np.diff(self.ys) <= 0).any():
            raise ValueError("a cost table's axes must increase")
        if not (np.isfinite(self.seconds).all() and (self.seconds > 0).all() and np.isfinite(log).all() and table.drift > 0):
            raise ValueError("a cost table's numbers must be positive and finite")
        self.measured = table.measured
        low, high = MEASURED_BOUNDS if table.measured else GUESSED_BOUNDS
        self._low, self._high = math.log(low), math.log(high)
        self._log = np.clip(log, self._low, self._high)
        self._drift = math.log(table.drift)
        self._octaves = np.log2(np.maximum(self.xs, 1.0))
        self._weight = np.zeros(shape)  # observations that met a point
        self._first: list[float] = []
        self._corrected: Array | None = None

    @property
    def drift(self) -> float:
        return math.exp(self._drift)

    def column(self, y: float) -> Array:
        """Seconds at every x of the axis for one y, without what lies between: [len(xs)]."""
        table = self._table()
        low, share = _place(self.ys, y, beyond=True)
        if len(self.ys) == 1:
            return table[:, 0]
        return np.maximum.accumulate(np.maximum(table[:, low] + share * (table[:, low + 1] - table[:, low]), 1e-9))

    def at(self, x: float | Array, y: float) -> Array:
        """Seconds at x (a number or an array of them) and y, shaped as x."""
        column, xs = self.column(y), self.xs
        x = np.asarray(x, dtype=np.float64)
        found = np.asarray(np.interp(x, xs, column))
        if len(xs) > 1 and x.size and x.max() > xs[-1]:
            slope = (column[-1] - column[-2]) / (xs[-1] - xs[-2])
            found = found + np.maximum(x - xs[-1], 0.0) * slope
        return found

    def observe(self, x: float, y: float, ratio: float) -> None:
        """A step at (x, y) took `ratio` times what was predicted. Ratios that are not positive and finite are dropped."""
        if not (ratio > 0 and math.isfinite(ratio)):
            return
        surprise = math.log(ratio)
        if not self.measured and len(self._first) < WARM_UP:
            self._first.append(surprise + self._drift)
            self._drift = sorted(self._first)[len(self._first) // 2]
            self._corrected = None
            return
        shock = SHOCK if self.measured else GUESSED_SHOCK
        surprise = min(max(surprise, -shock), shock)
        self._drift += (DRIFT_RATE if self.measured else GUESSED_DRIFT_RATE) * surprise
        if self.measured:
            near = np.maximum(1.0 - np.abs(self._octaves - math.log2(max(x, 1.0))) / REACH, 0.0)
            self._log += RATE * surprise * np.outer(near, self._shares(y))
            np.clip(self._log, self._low, self._high, out=self._log)
            self._corrected = None
            return
        for i, j, share in self._around(x, y):
            self._weight[i, j] += share
            # A point that nobody measured learns from its first visits faster.
            rate = max(GUESSED_RATE, 1 / (self._weight[i, j] + 2))
            self._log[i, j] = min(max(self._log[i, j] + rate * share * surprise, self._low), self._high)
        self._corrected = None

    def table(self) -> SurfaceTable:
        return SurfaceTable(
            xs=self.xs.tolist(), ys=self.ys.tolist(), seconds=self.seconds.tolist(), corrections=np.exp(self._log).tolist(),
            drift=self.drift, measured=self.measured,
        )  # fmt: skip

    def _table(self) -> Array:
        if self._corrected is None:
            corrected = self.seconds * np.exp(self._log + self._drift)
            self._corrected = np.maximum.accumulate(corrected, axis=0)
        return self._corrected

    def _shares(self, y: float) -> Array:
        """How much each point of the second axis has in y; they sum to 1."""
        shares = np.zeros(len(self.ys))
        low, above = _place(self.ys, y)
        shares[low] = 1 - above
        if above:
            shares[low + 1] = above
        return shares

    def _around(self, x: float, y: float) -> list[tuple[int, int, float]]:
        """The points around (x, y), each with its share of it; the shares sum to 1."""
        row, right = _place(self.xs, x)
        col, above = _place(self.ys, y)
        corners = [(row, col, (1 - right) * (1 - above)), (row + 1, col, right * (1 - above))]
        corners += [(row, col + 1, (1 - right) * above), (row + 1, col + 1, right * above)]
        return [corner for corner in corners if corner[2] > 0]


def _place(axis: Array, value: float, *, beyond: bool = False) -> tuple[int, float]:
    """The interval of `axis` that holds the value, and how far into it (0..1; more than 1 when `beyond` the last is asked)."""
    if len(axis) == 1:
        return 0, 0.0
    low = min(max(int(np.searchsorted(axis, value, side="right")) - 1, 0), len(axis) - 2)
    share = max((value - float(axis[low])) / float(axis[low + 1] - axis[low]), 0.0)
    return low, share if beyond else min(share, 1.0)
