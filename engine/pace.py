"""How many tokens may be caught up in one step: as many as take a given time on this machine, found out on the way."""

from __future__ import annotations

SHORT = 32  # tokens: what takes less is mostly overhead and says nothing about the rate


class Pace:
    """`limit` tokens take about `seconds`; it lies between SHORT and `most`."""

    def __init__(self, most: int, seconds: float) -> None:
        self._most, self._seconds = most, seconds
        self.limit = min(most, 2 * SHORT)  # nothing is known yet

    def took(self, tokens: int, seconds: float) -> None:
        """So many tokens were fed in so long. At most doubled at once: a fast first time may be a lucky one."""
        if tokens >= SHORT:
            fits = int(tokens * self._seconds / max(seconds, 1e-9))
            self.limit = min(max(fits, SHORT), 2 * self.limit, self._most)
