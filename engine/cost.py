"""What a step will cost on this machine: verifying some tokens, and drafting them. Seconds, from measured tables.

verify = table(tokens, context per sequence) + (sequences - 1) * (a + b * context per sequence): everything of a step but
the drafting, that is the forward, the target law, the verdict, packing the accepted path and the bookkeeping. Prompt tokens
in the same step count as tokens. draft = one table (sequences, depth) per drafter, its own KV and catching up included.
Tables come from a start-up profile (engine/profile.py) or, before there is one, from a coarse guess; both are corrected
while the engine runs (engine/surface.py). Costs are staircases: the tables say so where they were measured, and `tier`
where the executor pads a step to fixed sizes.
Sources: SmartSpec (arXiv 2406.14066) for the split, core.md A.3 and J.6 for tables instead of a fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.messages import EngineInfo
from engine.surface import Surface, SurfaceTable

DRAFT_SEQUENCES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
DRAFT_DEPTHS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
GUESSED_TOKENS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0]
GUESSED_CONTEXTS = [0.0, 512.0, 2048.0]
ERROR_RATE = 0.02


class CostTables(msgspec.Struct, kw_only=True):
    """What a cost model is made of, as it is kept on disk."""

    verify: SurfaceTable  # over (tokens, context tokens per sequence), one sequence
    per_sequence: float = 0.0  # seconds of each further sequence
    per_sequence_context: float = 0.0  # and of each further sequence and token of its context
    drafts: dict[str, SurfaceTable] = {}  # by drafter, over (sequences, depth)


class CostModel:
    """Predicts and learns. `tier(tokens)` is how many rows a step of so many tokens is really run with."""

    def __init__(self, tables: CostTables, tier: Callable[[int], int] | None = None) -> None:
        """Raises ValueError for tables that cannot be used."""
        if tables.per_sequence < 0 or tables.per_sequence_context < 0:
            raise ValueError("a sequence cannot cost less than nothing")
        self._verify = Surface(tables.verify)
        self._per_sequence, self._per_sequence_context = tables.per_sequence, tables.per_sequence_context
        self._drafts = {name: Surface(table) for name, table in tables.drafts.items()}
        self._tier = tier
        self._tiers = np.zeros(0)
        self.error = 0.0  # mean |predicted / measured - 1| of the steps seen lately

    @property
    def measured(self) -> bool:
        """Whether a profile stands behind the tables; False for a guess."""
        return self._verify.measured

    @overload
    def verify_seconds(self, tokens: int, context_tokens: int, sequences: int) -> float: ...

    @overload
    def verify_seconds(self, tokens: NDArray[np.int64], context_tokens: int, sequences: int) -> NDArray[np.float64]: ...

    def verify_seconds(self, tokens: int | NDArray[np.int64], context_tokens: int, sequences: int) -> float | NDArray[np.float64]:
        """Seconds of a step that feeds `tokens` rows (a number, or an array of numbers to compare), drafting apart.

        context_tokens: KV entries of all the step's sequences together. Never decreases with `tokens`; always positive.
        """
        context = context_tokens / max(sequences, 1)
        found = self._verify.at(self._fed(tokens), context) + self._further(context, sequences)
        return found if isinstance(tokens, np.ndarray) else float(found)

    def draft_seconds(self, drafter: str, sequences: int, depth: int) -> float:
        """Seconds that a drafter takes to draft for so many sequences to such a depth. 0 for nobody, or for no depth."""
        if sequences < 1 or depth < 1:
            return 0.0
        return float(self._draft(drafter).at(float(sequences), float(depth)))

    def observe(self, tokens: int, context_tokens: int, sequences: int, seconds: float) -> None:
        """A step's real time, drafting apart."""
        if tokens < 1 or not seconds > 0:
            return
        context = context_tokens / max(sequences, 1)
        ratio = seconds / self.verify_seconds(tokens, context_tokens, sequences)
        self.error += ERROR_RATE * (min(abs(1 / ratio - 1), 1.0) - self.error)
        self._verify.observe(float(self._fed(tokens)), context, ratio)

    def observe_draft(self, drafter: str, sequences: int, depth: int, seconds: float) -> None:
        """What drafting really took."""
        if sequences < 1 or depth < 1 or not seconds > 0:
            return
        predicted = self.draft_seconds(drafter, sequences, depth)
        self._draft(drafter).observe(float(sequences), float(depth), seconds / predicted)

    def expect_depth(self, drafter: str, seconds: float) -> None:
        """A depth of this drafter was timed, for one sequence. What was learned of it before stands if that agrees."""
        known = self._drafts.get(drafter)
        if known is None or not 0.5 < float(known.at(1.0, 1.0)) / seconds < 2.0:
            self._drafts[drafter] = Surface(guess_model_draft(seconds))

    def tables(self) -> CostTables:
        """The tables with what was learned about them."""
        return CostTables(
            verify=self._verify.table(),
            per_sequence=self._per_sequence,
            per_sequence_context=self._per_sequence_context,
            drafts={name: surface.table() for name, surface in self._drafts.items()},
        )

    def _further(self, context: float, sequences: int) -> float:
        """What the sequences beyond the first add, as slow as the machine is at the moment."""
        return max(sequences - 1, 0) * (self._per_sequence + self._per_sequence_context * context) * self._verify.drift

    def _draft(self, drafter: str) -> Surface:
        surface = self._drafts.get(drafter)
        if surface is None:
            surface = self._drafts[drafter] = Surface(guess_draft())
        return surface

    def _fed(self, tokens: int | NDArray[np.int64]) -> NDArray[np.float64]:
        """Rows really run for each number of tokens."""
        if self._tier is None:
            return np.asarray(tokens, dtype=np.float64)
        most = int(np.max(tokens, initial=0))
        if most >= len(self._tiers):
            self._tiers = np.array([self._tier(count) for count in range(most + 65)], dtype=np.float64)
        return self._tiers[tokens]


def guess(info: EngineInfo) -> CostTables:
    """Costs from the model's size alone: weights are read once per step, then every token computes with all of them.

    Good to a factor of a few, and an optimist about tokens: who believes them dear never tries, and never learns better.
    """
    gpu = info.device.startswith("cuda")
    bytes_per_second, operations_per_second, fixed = (2e12, 1e15, 1e-3) if gpu else (2e10, 2e12, 1e-3)
    weights = max(info.weight_bytes, 1 << 20)
    operations = float(weights)  # per token: two for each 16-bit weight
    kv = info.kv_bytes / max(info.num_blocks * info.block_size, 1)  # bytes per token of context
    read = weights / bytes_per_second
    rows = [
        [fixed + max(read, tokens * operations / operations_per_second) + tokens * context * kv / bytes_per_second / 8]
        for tokens in GUESSED_TOKENS
        for context in GUESSED_CONTEXTS
    ]
    seconds = np.array(rows).reshape(len(GUESSED_TOKENS), len(GUESSED_CONTEXTS)).tolist()
    return CostTables(
        verify=SurfaceTable(xs=GUESSED_TOKENS, ys=GUESSED_CONTEXTS, seconds=seconds, measured=False),
        per_sequence_context=kv / bytes_per_second,
    )


def guess_draft(base: float = 2e-5, per_sequence: float = 3e-5, per_depth: float = 1e-6) -> SurfaceTable:
    """A drafter that looks things up in memory; what one with a model costs has to be measured, and soon is."""
    rows = [[base + n * (per_sequence + d * per_depth) for d in DRAFT_DEPTHS] for n in DRAFT_SEQUENCES]
    return SurfaceTable(xs=DRAFT_SEQUENCES, ys=DRAFT_DEPTHS, seconds=rows, measured=False)


def guess_model_draft(seconds: float, per_sequence: float = 0.05) -> SurfaceTable:
    """A drafter with a model: a forward per depth, of `seconds` for one sequence, little dearer for each further one."""
    rows = [[d * seconds * (1 + per_sequence * (n - 1)) for d in DRAFT_DEPTHS] for n in DRAFT_SEQUENCES]
    return SurfaceTable(xs=DRAFT_SEQUENCES, ys=DRAFT_DEPTHS, seconds=rows, measured=False)


def non_decreasing(values: Iterable[float]) -> list[float]:
    """The closest sequence, in squares, that never decreases (pool adjacent violators): noise averaged, steps kept."""
    pools: list[tuple[float, int]] = []  # mean, count
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    return [mean for mean, count in pools for _ in range(count)]
