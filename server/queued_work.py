"""How long the work that waits will take: tokens that wait, divided by the tokens a second that one engine has been doing.

What to scale replicas by. A count of requests does not say how long they are, and a busy processor says nothing: it is
as busy with one request as with sixty.
"""

from __future__ import annotations

import math

from engine.messages import EngineStats
from server.histogram import Histogram

RECENT_SECONDS = 20.0  # of steps; the rate forgets by a factor e in that time
RECENT_ANSWERS = 50.0


class QueuedWork:
    """An estimate for one engine, in seconds.

    What waits is every prompt token that no step has computed, and for each waiting sequence an answer as long as recent
    ones were. The rate counts prompt and answer tokens alike, so it is fair as long as what waits is like what was served.
    Too high after an idle time, when the rate is still that of a small batch; too high by what the prefix cache holds.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._rate = _Ratio(RECENT_SECONDS)  # tokens : seconds of steps
        self._answer = _Ratio(RECENT_ANSWERS)  # tokens : answers

    def update(self, stats: EngineStats, answers: Histogram) -> None:
        """`answers`: the lengths of finished sequences. Zero until the engine has done a step."""
        self._rate.update(stats.prompt_tokens + stats.generation_tokens, stats.seconds_step)
        self._answer.update(answers.total, answers.count)
        tokens = stats.uncomputed_tokens + stats.waiting * self._answer.value
        self.seconds = tokens / self._rate.value if self._rate.value else 0.0


class _Ratio:
    """Growth of one cumulative number over the growth of another; the older counts less."""

    __slots__ = ("_latest", "_recent", "_sums")

    def __init__(self, recent: float) -> None:
        self._recent = recent
        self._latest = (0.0, 0.0)
        self._sums = (0.0, 0.0)

    @property
    def value(self) -> float:
        return self._sums[0] / self._sums[1] if self._sums[1] else 0.0

    def update(self, one: float, other: float) -> None:
        grown = one - self._latest[0], other - self._latest[1]
        self._latest = one, other
        if min(grown) < 0:  # a new engine counts from zero
            return
        kept = math.exp(-grown[1] / self._recent)
        self._sums = self._sums[0] * kept + grown[0], self._sums[1] * kept + grown[1]
