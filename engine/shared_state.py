"""What drafters remember beyond a sequence: by cache salt, so that no tenant learns from another, and bounded in bytes.

`SaltedStore` holds one value per salt. Values bound themselves; the store bounds their sum by dropping whole salts, the least
recently used first. `Generations` is such a value: a mapping in two generations, of which the older is dropped when the younger
has taken half of the room. So what is old leaves in one go and without a list of ages, and what is written again stays.

Bytes are counted, not measured: an entry is charged what CPython takes for it (a test compares the two).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

SALT_BYTES = 2048  # charged for a salt that has nothing yet: its value, its place in the store


class Bounded(Protocol):
    """Counts its own bytes; never takes more than the limit it was made with, one entry apart."""

    @property
    def num_bytes(self) -> int: ...


B = TypeVar("B", bound=Bounded)
K = TypeVar("K")
V = TypeVar("V")


class SaltedStore(Generic[B]):
    """One value per salt, `limit` bytes in all. `make(limit)` gives the value of a new salt."""

    def __init__(self, make: Callable[[int], B], limit: int) -> None:
        """Raises ValueError for a limit that holds nothing."""
        if limit <= SALT_BYTES:
            raise ValueError(f"shared drafter state needs more than {SALT_BYTES} bytes, not {limit}")
        self.limit = limit
        self.num_bytes = 0
        self._make = make
        self._values: dict[str, B] = {}  # in the order of their last use
        self._counted: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._values)

    def find(self, salt: str) -> B | None:
        """A salt's value if it has one; it counts as used."""
        value = self._values.pop(salt, None)
        if value is not None:
            self._values[salt] = value
        return value

    def get(self, salt: str) -> B:
        """A salt's value, made when it has none. Call `settle` after writing to it."""
        value = self.find(salt)
        if value is None:
            value = self._values[salt] = self._make(self.limit - SALT_BYTES - len(salt))
            self.settle(salt)
        return value

    def settle(self, salt: str) -> None:
        """Count a salt anew after its value grew, and drop others if they no longer fit. Unknown salts are ignored."""
        value = self._values.get(salt)
        if value is None:
            return
        size = SALT_BYTES + len(salt) + value.num_bytes
        self.num_bytes += size - self._counted.get(salt, 0)
        self._counted[salt] = size
        while self.num_bytes > self.limit and len(self._values) > 1:
            oldest = next(iter(self._values))
            del self._values[oldest]
            self.num_bytes -= self._counted.pop(oldest)


class Generations(Generic[K, V]):
    """A mapping that never takes much more than `limit` bytes at `entry_bytes` an entry; the older half leaves together."""

    def __init__(self, limit: int, entry_bytes: int) -> None:
        self.limit, self.entry_bytes = limit, entry_bytes
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}
        self._extra = [0, 0]  # bytes of young and old entries beyond entry_bytes

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    @property
    def num_bytes(self) -> int:
        return self.entry_bytes * len(self) + sum(self._extra)

    def find(self, key: K) -> V | None:
        value = self._young.get(key)
        return value if value is not None else self._old.get(key)

    def put(self, key: K, value: V) -> bool:
        """Set an entry; True if it is new to the younger generation."""
        before = len(self._young)
        self._young[key] = value
        new = len(self._young) > before
        if new:
            self.charge(0)
        return new

    def charge(self, extra: int) -> None:
        """The entry just put takes so many bytes more than entry_bytes, or than before."""
        self._extra[0] += extra
        if 2 * (self.entry_bytes * len(self._young) + self._extra[0]) >= self.limit:
            self._old, self._young = self._young, {}
            self._extra = [0, self._extra[0]]
