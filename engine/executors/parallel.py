"""Rank 0 of several: it decides, here; the others follow, wherever they were placed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from engine.broadcast import Stop, tell
from engine.config import EngineConfig
from engine.executors.local import LocalExecutor
from engine.executors.ranks import Ranks
from engine.executors.watchdog import Watchdog
from engine.parallel import ALONE, Group
from engine.plan import StepPlan, StepResult
from engine.probe import Probe
from engine.worker import device_of

NOTICE_SECONDS = 2.0  # between a broken connection and the end of the process behind it
LOOK_SECONDS = 0.01


class ParallelExecutor(LocalExecutor):
    """As LocalExecutor, of a model that `ranks` have the other parts of. They must be on their way to `rendezvous`.

    Raises RankLostError, from whatever it was doing, when one of them dies, hangs or differs; ValueError when one could not load
    its part. The ranks are ended when this cannot be made, and by `close`.
    """

    def __init__(self, config: EngineConfig, ranks: Ranks, rendezvous: str, local_rank: int = 0) -> None:
        self._ranks = ranks
        self._group = ALONE
        self._steps: int | None = 0  # which step is under way; 0: the start
        self._on_gpu = self._closed = False
        self._watchdog = Watchdog(self._pulse, ranks, config.rank_timeout)
        try:
            device = device_of(config, local_rank)
            self._on_gpu = device.type == "cuda"
            with self._explained():
                self._group = Group.join(0, config.tensor_parallel_size, rendezvous, device, in_order=config.deterministic)
                super().__init__(config, self._group, device)
        except BaseException:
            self._end()
            raise
        self._count, self._steps = 0, None
        self._watchdog.armed = True

    def execute(self, plan: StepPlan) -> StepResult:
        with self._explained(), self._step():
            return super().execute(plan)

    def probe(self, probe: Probe) -> float:
        with self._explained(), self._step():
            return super().probe(probe)

    def study(self) -> bool:
        with self._explained(), self._step():
            return super().study()

    def check(self) -> None:
        """Raises RankLostError when a rank is gone."""
        if self._watchdog.why is not None:
            raise self._watchdog.why

    def close(self) -> None:
        """A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._watchdog.why is None:
            with contextlib.suppress(RuntimeError):  # one that went this very moment
                tell(self._group, Stop())
            self._watchdog.stop()
            self._ranks.leave()
        super().close()
        self._end()

    def _end(self) -> None:
        self._watchdog.stop()
        self._ranks.end()
        self._ranks.leave()
        self._group.leave()

    def _pulse(self) -> tuple[str, int] | None:
        """What rank 0 may be waiting in. A GPU is waited for somewhere in the step, and the start somewhere in a library."""
        if self._steps is not None and (self._on_gpu or self._group is ALONE):
            return "step", self._steps
        pulse = self._group.pulse
        return None if pulse is None else ("call", pulse)

    @contextlib.contextmanager
    def _step(self) -> Iterator[None]:
        self._count += 1
        self._steps = self._count
        try:
            yield
        finally:
            self._steps = None

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """A connection that broke is told as what happened to the rank behind it."""
        try:
            yield
        except RuntimeError as error:
            left = NOTICE_SECONDS
            while (why := self._watchdog.why or self._ranks.lost()) is None and left > 0:
                time.sleep(LOOK_SECONDS)
                left -= LOOK_SECONDS
            if why is None:
                raise
            raise why from error
