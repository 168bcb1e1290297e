"""The start-up profile: which steps to time, in the order of what they tell, and the cost tables that follow from the times.

It can stop after any probe and go on in another process: what was measured is kept, and what another process measures on
another day is scaled by how fast the same small steps are then. Coarse shapes first; then it looks for the stairs: the
interval of token counts whose middle is least certain is halved, again and again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median, median_low

import msgspec
import numpy as np

from engine.cost import CostModel, CostTables, guess, non_decreasing
from engine.messages import EngineInfo
from engine.probe import Probe, tokens_probe
from engine.surface import Array, SurfaceTable

REPEATS = 3
CONTEXT = 1024  # tokens: the second point of the context axis. What a context costs grows in proportion from there
PROMPT = 512  # tokens of the prompt chunk
# 12 is the tile of the native kernels (kernels/cpu/linear.h): up to there a row costs next to nothing.
COARSE_TOKENS = (1, 16, 12, 4, 8, 13, 32, 64, 2, 128)
CONTEXT_TOKENS = (1, 16, 64)  # where the cost of context is measured; between them it is interpolated
CERTAIN = 0.04  # an interval of token counts is not halved when its middle cannot be further off than this
MOST_POINTS = 40  # token counts
ENOUGH_POINTS = 3


class Sample(msgspec.Struct, array_like=True):
    probe: Probe
    seconds: list[float]


class Profile:
    """Measurements so far. `run` times one probe; it is called while there is time."""

    def __init__(self, info: EngineInfo, samples: list[Sample] | None = None) -> None:
        self.info = info
        self.seconds: dict[Probe, list[float]] = {s.probe: list(s.seconds) for s in samples or [] if s.seconds}
        self.complete = False
        context = min(CONTEXT, info.max_model_len // 2) // info.block_size * info.block_size
        coarse = [tokens_probe(tokens) for tokens in COARSE_TOKENS]
        coarse += [Probe(16, 0, 0), Probe(0, 0, 0, min(PROMPT, info.max_num_batched_tokens))]
        coarse += [Probe(1, 0, context), Probe(1, 15, context), Probe(16, 0, context), Probe(4, 15, context)]
        self.coarse = [probe for probe in dict.fromkeys(coarse) if probe.fits(info)]

    def measure(self, run: Callable[[Probe], float], seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """Time probes until the time is over (by at most the last of them) or nothing is left to learn."""
        deadline = clock() + seconds
        scale = self._scale(run) if self.seconds else 1.0
        if not self.seconds and self.coarse:
            run(self.coarse[0])  # the first step of a process pays for what is set up once
        skipped = False
        for probe in self._wanted():
            left = deadline - clock()
            if left <= 0:
                return
            if self._expected(probe) / scale > left:
                skipped = True  # a smaller one may still fit
            else:
                self.seconds.setdefault(probe, []).append(run(probe) * scale)
        self.complete = not skipped

    def samples(self) -> list[Sample]:
        return [Sample(probe, seconds) for probe, seconds in self.seconds.items()]

    def tables(self) -> CostTables:
        """What the measurements say; with too few of them, the guess brought to their level."""
        each, each_context = self._per_sequence()
        points = self._points(each)
        if len(points) < ENOUGH_POINTS:
            return self._scaled_guess()
        xs = sorted(points)
        bare = np.array(non_decreasing([points[x] for x in xs]))
        columns, contexts = [bare], [0.0]
        for context in sorted({probe.context for probe in self.seconds if probe.context}):
            columns.append(np.maximum(columns[-1], bare + self._context_cost(context, xs, each + each_context * context, points)))
            contexts.append(float(context))
        seconds = np.maximum.accumulate(np.stack(columns, axis=1), axis=0)
        verify = SurfaceTable(xs=[float(x) for x in xs], ys=contexts, seconds=seconds.tolist())
        return CostTables(verify=verify, per_sequence=each, per_sequence_context=each_context)

    # ---- what to measure next

    def _wanted(self) -> Iterator[Probe]:
        """The coarse probes round by round, so that a slow moment of the machine does not fall on one of them; then stairs."""
        for repeat in range(REPEATS):
            for probe in self.coarse:
                if len(self.seconds.get(probe, ())) <= repeat:
                    yield probe
        while (tokens := self._least_certain()) is not None:
            probe = tokens_probe(tokens)
            before = len(self.seconds.get(probe, ()))
            for _ in range(REPEATS):
                yield probe
            if len(self.seconds.get(probe, ())) == before:
                return  # it was too slow for what time is left

    def _least_certain(self) -> int | None:
        """The middle of the interval of token counts in which a stair could change the most, relative to its cost."""
        points = self._points(self._per_sequence()[0])
        xs = sorted(x for x in points if tokens_probe(x) in self.seconds)
        if len(xs) >= MOST_POINTS:
            return None
        costs = non_decreasing([points[x] for x in xs])
        worst, found = CERTAIN, None
        for i in range(len(xs) - 1):
            low, high = xs[i], xs[i + 1]
            middle = split(low, high)
            # Half of the rise is what the straight line between the two can be wrong by.
            doubt = (costs[i + 1] - costs[i]) / costs[i] / 2
            if high - low > 1 and doubt > worst and tokens_probe(middle).fits(self.info):
                worst, found = doubt, middle
        return found

    def _expected(self, probe: Probe) -> float:
        """Seconds that a probe cannot well exceed: as many times the largest step so far as it has tokens."""
        if probe in self.seconds:
            return min(self.seconds[probe])
        known = max(self.seconds, key=lambda p: p.tokens, default=None)
        return min(self.seconds[known]) * max(1.0, probe.tokens / known.tokens) if known is not None else 0.0

    def _scale(self, run: Callable[[Probe], float]) -> float:
        """What to multiply a time of this process with to compare it with the kept ones."""
        known = [probe for probe in self.coarse[:2] if probe in self.seconds]
        for probe in known[:1]:
            run(probe)
        ratios = [self._typical(probe) / median(run(probe) for _ in range(REPEATS)) for probe in known]
        return median(ratios) if ratios else 1.0

    # ---- what the measurements say

    def _typical(self, probe: Probe) -> float:
        """The lower median: of two, the second alone counts, as the first may have compiled something."""
        return median_low(self.seconds[probe])

    def _points(self, each: float) -> dict[int, float]:
        """Seconds of a step of one sequence by its tokens, no context."""
        points: dict[int, float] = {}
        for probe in self.seconds:
            sequences = probe.sequences + bool(probe.prompt)
            if probe.context == 0 and probe != Probe(16, 0, 0):
                points[probe.tokens] = max(self._typical(probe) - (sequences - 1) * each, self._typical(probe) / 2)
        return points

    def _per_sequence(self) -> tuple[float, float]:
        """Seconds of each further sequence, and of each further sequence and token of context: 16 rows of 16 or of 1."""
        found = {}
        for context in {probe.context for probe in self.seconds}:
            many, one = Probe(16, 0, context), Probe(1, 15, context)
            if many in self.seconds and one in self.seconds:
                found[context] = max(self._typical(many) - self._typical(one), 0.0) / 15
        each = found.pop(0, 0.0)
        slopes = [max(seconds - each, 0.0) / context for context, seconds in found.items()]
        return each, median(slopes) if slopes else 0.0

    def _context_cost(self, context: int, xs: list[int], each: float, points: dict[int, float]) -> Array:
        """Seconds that a context adds to a step of one sequence, for each token count of the axis."""
        known: dict[int, float] = {}
        for probe in self.seconds:
            if probe.context == context and probe.tokens in CONTEXT_TOKENS and probe != Probe(16, 0, context):
                bare = self._typical(probe) - (probe.sequences - 1) * each
                known[probe.tokens] = max(bare - points.get(probe.tokens, bare), 0.0)
        if not known:
            return np.zeros(len(xs))
        where = sorted(known)
        cost = [known[x] for x in where]
        last = where[-1]  # beyond it every further row pays for the context as well
        return np.array([float(np.interp(x, where, cost)) * max(x / last, 1.0) for x in xs])

    def _scaled_guess(self) -> CostTables:
        tables = guess(self.info)
        model = CostModel(tables)
        ratios = [
            self._typical(probe) / model.verify_seconds(probe.tokens, probe.context * probe.sequences, max(probe.sequences, 1))
            for probe in self.seconds
        ]
        tables.verify.drift = median(ratios) if ratios else 1.0
        return tables


def split(low: int, high: int) -> int:
    """The middle, or just behind it where it is a round number: stairs rise behind those, and at them would not be seen."""
    middle = (low + high) // 2
    return middle + 1 if middle % 4 == 0 and middle + 1 < high else middle
