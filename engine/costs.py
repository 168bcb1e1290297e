"""The cost model's life in an engine: what was kept is read, what is missing is measured, what was learned is kept."""

from __future__ import annotations

import logging
import time
from importlib import metadata
from pathlib import Path
from typing import Protocol, runtime_checkable

from engine import cost_store
from engine.config import EngineConfig
from engine.cost import CostModel, CostTables, guess
from engine.cost_store import CostFile
from engine.messages import EngineInfo
from engine.probe import Probe
from engine.profile import Profile

logger = logging.getLogger("outrider.engine.cost")

COLD_SECONDS = 1.0  # of profiling before the engine is ready, where nothing is kept
RESUME_SECONDS = 0.3  # and where something is, but not all


@runtime_checkable
class Measurable(Protocol):
    """An executor whose steps can be timed before there are requests."""

    info: EngineInfo

    def platform(self) -> dict[str, str]:
        """What its speed depends on besides model and configuration: device, threads, versions of the libraries."""
        ...

    def tier(self, tokens: int) -> int:
        """How many rows a step of so many tokens is really run with, where it is padded."""
        ...

    def probe(self, probe: Probe) -> float:
        """Seconds of one step of this shape, drafting apart. Runs on every rank; rank 0 tells the time."""
        ...


class Costs:
    """`model` is what the policy asks and the engine teaches. An executor that cannot be measured gets a guess."""

    def __init__(
        self, config: EngineConfig, executor: object, info: EngineInfo, *, seconds: float | None = None, fresh: bool = False
    ) -> None:
        """Profiles for `seconds` at most (None: as long as a start may take), where the configuration allows it.

        fresh: what is kept is not read.
        """
        self.file: Path | None = None
        self.key: dict[str, str] = {}
        self.profile = Profile(info)
        if not isinstance(executor, Measurable):
            self.model = CostModel(guess(info))
            self._expect_depths(info)
            return
        self.key = key(config, info, executor.platform())
        self.file = cost_store.path(config, self.key)
        kept = None if fresh else cost_store.load(self.file, self.key)
        if kept is not None:
            self.profile = Profile(info, kept.samples)
            self.profile.complete = kept.complete
        tables = kept.tables if kept is not None else None
        if config.profile and not self.profile.complete:
            started, before = time.perf_counter(), len(self.profile.samples())
            default = RESUME_SECONDS if before else COLD_SECONDS
            self.profile.measure(executor.probe, default if seconds is None else seconds)
            if len(self.profile.samples()) > before or tables is None:
                # Corrections belong to the points they were learned at; drafters' costs stay.
                tables = _with_drafts(self.profile.tables(), tables)
            spent, shapes = time.perf_counter() - started, len(self.profile.samples())
            logger.info("costs profiled: %d shapes known, %.1f s", shapes, spent)
        self.model = CostModel(tables if tables is not None else guess(info), executor.tier)
        self._expect_depths(info)
        if config.profile:
            self.save()

    def _expect_depths(self, info: EngineInfo) -> None:
        for drafter, seconds in info.depth_seconds.items():
            self.model.expect_depth(drafter, seconds)

    def save(self) -> None:
        """Keep the tables with what was learned since."""
        if self.file is not None:
            kept = CostFile(
                key=self.key, tables=self.model.tables(), samples=self.profile.samples(), complete=self.profile.complete
            )
            cost_store.save(self.file, kept)


def key(config: EngineConfig, info: EngineInfo, platform: dict[str, str]) -> dict[str, str]:
    """What a table belongs to. Anything that changes the time of a step changes the key."""
    if config.deterministic and info.backend != "native":  # other kernels
        platform = platform | {"deterministic": "yes"}
    return platform | {
        "model": cost_store.fingerprint(config.model),
        "architecture": info.architecture,
        "dtype": info.dtype,
        "weight_bytes": str(info.weight_bytes),  # tells quantizations apart
        "backend": info.backend,
        "block_size": str(info.block_size),
        "load_format": config.load_format,
        "tensor_parallel_size": str(config.tensor_parallel_size),
        "verifier": info.verifier,
        "outrider": _version(),
    }


def _with_drafts(tables: CostTables, kept: CostTables | None) -> CostTables:
    if kept is not None:
        tables.drafts = kept.drafts
    return tables


def _version() -> str:
    try:
        return metadata.version("outrider")
    except metadata.PackageNotFoundError:
        return "unknown"
