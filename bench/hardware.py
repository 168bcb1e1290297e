"""Machines for the simulation: what verifying and drafting take on them. Shapes that policies meet, and one measured table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.cost import CostModel, CostTables

MEASURED = Path(__file__).with_name("cpu_costs.json")
LOOKUP = (1.3e-4, 9e-6)  # seconds of the n-gram drafter: once, and per sequence (bench/RESULTS.md, the parts of a step)


@dataclass(frozen=True)
class Affine:
    """Seconds in proportion: a step, each token, each token of context, each sequence."""

    name: str
    step: float
    token: float
    context: float
    sequence: float
    lookup: tuple[float, float] = LOOKUP

    def verify(self, tokens: int, context_tokens: int, sequences: int) -> float:
        return self.step + tokens * self.token + context_tokens * self.context + sequences * self.sequence

    def draft(self, sequences: int, depth: int) -> float:
        return self.lookup[0] + sequences * self.lookup[1]


@dataclass(frozen=True)
class Roofline(Affine):
    """Reads its weights while it computes: tokens are free until computing takes longer than reading, `step` seconds."""

    overhead: float = 0.0

    def verify(self, tokens: int, context_tokens: int, sequences: int) -> float:
        both = max(self.step, tokens * self.token)
        return self.overhead + both + context_tokens * self.context + sequences * self.sequence


@dataclass(frozen=True)
class Stairs:
    """Another machine whose steps are padded to fixed sizes (captured graphs, tiles); beyond the last to multiples of it."""

    inner: Affine
    sizes: Sequence[int]

    @property
    def name(self) -> str:
        return f"{self.inner.name} stairs"

    def padded(self, tokens: int) -> int:
        last = self.sizes[-1]
        return next((size for size in self.sizes if size >= tokens), math.ceil(tokens / last) * last)

    def verify(self, tokens: int, context_tokens: int, sequences: int) -> float:
        return self.inner.verify(self.padded(tokens), context_tokens, sequences)

    def draft(self, sequences: int, depth: int) -> float:
        return self.inner.draft(sequences, depth)


class Table:
    """A measured table, as `outrider profile` keeps it.

    The default: SmolLM2-135M-Instruct in bfloat16 on one thread of an AMD EPYC with AVX-512-BF16, native kernels, 2026-11-20;
    processor time, as the machine was busy, medians of 45 rounds. Raises OSError and ValueError for a file that is none."""

    def __init__(self, file: Path = MEASURED, name: str = "cpu") -> None:
        self.name = name
        try:
            self._cost = CostModel(msgspec.json.decode(file.read_bytes(), type=CostTables))
        except msgspec.DecodeError as error:
            raise ValueError(f"{file}: {error}") from error

    def verify(self, tokens: int, context_tokens: int, sequences: int) -> float:
        return self._cost.verify_seconds(tokens, context_tokens, sequences)

    def draft(self, sequences: int, depth: int) -> float:
        return LOOKUP[0] + sequences * LOOKUP[1]


# An 8B model on one H100, by the fit in core.md A.1 (LiuXiaoxuanPKU/vllm, branch req-dsd): milliseconds.
GPU = Affine("gpu", step=6.9e-3, token=1.84e-5, context=4.9e-8, sequence=1e-5)
GPU_STAIRS = Stairs(GPU, (1, 2, 4, *range(8, 257, 8)))
# The same model where computing, not reading, soon is the limit: a small GPU, or a large batch of a quantized model.
SMALL = Roofline("small gpu", step=8e-3, token=2e-4, context=1e-7, sequence=2e-5, overhead=1e-3)
SMALL_STAIRS = Stairs(SMALL, (1, 2, 4, 8, 16, 32, 64, 128, 256))
