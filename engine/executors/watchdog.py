"""A thread beside rank 0 that sees when another rank is gone, or keeps rank 0 waiting for too long, and ends the wait."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from engine.executors.ranks import RankLostError, Ranks

logger = logging.getLogger("outrider.engine.ranks")

TICK = 0.25  # seconds between two looks
GRACE = 5.0  # seconds in which rank 0 has to notice that another rank is gone


class Watchdog:
    """`pulse` says which wait rank 0 is in, None while in none. One that lasts longer than `seconds` ends all other ranks, which
    closes their connections and so rank 0's wait; where even that does not help, this process ends.

    Time is counted in ticks of its own, so that a machine that slept, or a stopped process group, is no silence.
    """

    def __init__(
        self,
        pulse: Callable[[], object],
        ranks: Ranks,
        seconds: float,
        *,
        tick: float = TICK,
        grace: float = GRACE,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.why: Exception | None = None  # to be raised: a rank was given up, or is gone
        self.armed = False  # while the ranks load their parts of the model nobody is too late
        self._pulse, self._ranks, self._seconds, self._tick, self._grace = pulse, ranks, seconds, tick, grace
        self._leave = leave
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        last, silent = None, 0.0
        while not self._over.wait(self._tick):
            now = self._pulse()
            silent = silent + self._tick if now is not None and now == last and self.armed else 0.0
            last = now
            if silent >= self._seconds:
                self.why = RankLostError(f"a rank kept the others waiting for {self._seconds:g} s")
                logger.error("%s: all are ended", self.why)
                self._ranks.end()
            else:
                self.why = self._ranks.lost()
            if self.why is not None:
                self._see_off()
                return

    def _see_off(self) -> None:
        """Rank 0 notices by itself; on a GPU it may wait for ever."""
        stuck, waited = self._pulse(), 0.0
        while stuck is not None and self._pulse() == stuck and not self._over.wait(self._tick):
            waited += self._tick
            if waited >= self._grace:
                logger.critical("rank 0 does not come back from waiting for the others (%s): the engine ends", self.why)
                self._leave(1)
                return
