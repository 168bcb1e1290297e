"""The arithmetic of a benchmark: percentiles, arrival times, and what one streamed answer says about speed."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


def percentile(values: Sequence[float], p: float) -> float:
    """The p-th percentile (0 <= p <= 100) with linear interpolation between ranks; NaN when there are no values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    rank = (len(ordered) - 1) * p / 100
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def poisson_arrivals(rate: float, count: int, seed: int) -> list[float]:
    """`count` arrival times in seconds of a Poisson process with `rate` arrivals per second; the same for the same seed."""
    if rate <= 0:
        raise ValueError("the rate of arrivals must be positive")
    generator = random.Random(seed)
    now = 0.0
    arrivals = []
    for _ in range(count):
        now += generator.expovariate(rate)
        arrivals.append(now)
    return arrivals


@dataclass(slots=True)
class Answer:
    """One request as its client saw it. Times are seconds of one monotonic clock.

    `times` holds the arrival of every event that carried text, so one entry may stand for several tokens; tokens are
    counted by the server's own `usage`. `end` is the arrival of the finish reason: tokens without text come before it.
    """

    prompt_id: str
    category: str
    start: float  # when the request was due: latency includes the wait for a connection
    end: float = 0.0
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    accepted_prediction_tokens: int = 0
    speculation: dict[str, Any] = field(default_factory=dict)  # the server's own account, where it was asked for one
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    counted: bool = True  # False: the server sent no usage and the events were counted instead

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return (self.times[0] if self.times else self.end) - self.start

    @property
    def e2e(self) -> float:
        return self.end - self.start

    @property
    def span(self) -> float:
        """From the first token to the last: the decoding alone."""
        return self.end - self.times[0] if self.times else 0.0

    @property
    def tpot(self) -> float:
        """Time per output token after the first; NaN when there is no second one."""
        return self.span / (self.tokens - 1) if self.tokens > 1 and self.times else math.nan

    @property
    def itl(self) -> list[float]:
        """Gaps between events, as a reader sees them."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


def decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens per second of one stream while it decodes: all tokens but the first of each answer, over the time they took."""
    spans = [answer for answer in answers if answer.tokens > 1 and answer.span > 0]
    seconds = sum(answer.span for answer in spans)
    return sum(answer.tokens - 1 for answer in spans) / seconds if seconds else math.nan
