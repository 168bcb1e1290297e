"""The bench: where a plug-in sits that took too long."""

from __future__ import annotations

FIRST_REST, LONGEST_REST = 30.0, 3600.0  # seconds


class Bench:
    """One drafter's place on it. Each rest is twice as long as the one before, until it has behaved for as long as it rested."""

    def __init__(self) -> None:
        self._until = 0.0
        self._observing_until = 0.0
        self._rest = 0.0

    def sits(self, now: float, *, observing: bool = False) -> bool:
        """Whether it may not be asked now; or, if only drafting was slow, may still observe."""
        return now < (self._observing_until if observing else self._until)

    def send(self, now: float, *, observing: bool = False) -> float:
        """To the bench; returns for how many seconds. One that is slow to observe does not draft either."""
        behaved = now > self._until + self._rest
        self._rest = FIRST_REST if behaved or not self._rest else min(2 * self._rest, LONGEST_REST)
        self._until = now + self._rest
        if observing:
            self._observing_until = self._until
        return self._rest
