"""How many requests the server takes at once. A full server says so at once (429) instead of letting a queue grow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from server.openai.errors import invalid, overloaded, unavailable


class Admission:
    """Counts requests between acceptance and last byte. Lives in one event loop, so it needs no lock."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.draining = False

    def drain(self) -> None:
        """From now on every new request gets 503; those in flight go on."""
        self.draining = True

    @contextmanager
    def slot(self, count: int = 1) -> Iterator[None]:
        """Holds `count` places. Raises ApiError 429 when they are taken, 400 for more than there are, 503 while draining."""
        if self.draining:
            raise unavailable("The server is shutting down.", "server_draining")
        if count > max(self.limit, 1):
            raise invalid(f"{count} prompts in one request, but this server takes {self.limit} at once.", "prompt")
        if self.in_flight + count > self.limit:
            raise overloaded(self.limit)
        self.in_flight += count
        try:
            yield
        finally:
            self.in_flight -= count
