"""What an executor asks of the ranks beside rank 0, wherever they run."""

from __future__ import annotations

from typing import Protocol

from engine.protocols import ExecutorLostError


class RankLostError(ExecutorLostError):
    """Another rank is gone, and with it a part of the model: this engine is over."""


class Ranks(Protocol):
    """Ranks 1 ... size - 1. May be asked from several threads."""

    def lost(self) -> Exception | None:
        """What to raise because one of them is gone: ValueError for one that could not load its part, by no fault of ours, and
        RankLostError else; None while all are there."""
        ...

    def end(self) -> None:
        """All of them, at once and by force; they may be gone already."""
        ...

    def leave(self) -> None:
        """They were told to stop: wait a moment for that, end who did not, and leave nothing behind."""
        ...
