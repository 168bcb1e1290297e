"""State that outlives sequences: never more than its limit, never another salt's, and the oldest leaves first."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.shared_state import SALT_BYTES, Generations, SaltedStore


class Box:
    """A value of whatever size it is told to be, within its limit."""

    def __init__(self, limit: int) -> None:
        self.limit, self.num_bytes = limit, 0


def test_a_salt_gets_its_own_value_back() -> None:
    store = SaltedStore(Box, 100_000)
    first = store.get("a")
    assert store.get("a") is first and store.find("a") is first
    assert store.get("b") is not first
    assert store.find("c") is None and len(store) == 2


def test_the_least_recently_used_salt_leaves_when_the_sum_exceeds_the_limit() -> None:
    store = SaltedStore(Box, 3 * SALT_BYTES + 1000)
    for salt in "abc":
        store.get(salt)
    store.find("a")
    store.get("c").num_bytes = 2000
    store.settle("c")
    assert store.find("b") is None
    assert store.find("a") is not None and store.find("c") is not None
    assert store.num_bytes == 2 * (SALT_BYTES + 1) + 2000
    store.settle("unknown")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30_000)), max_size=60))
def test_the_sum_is_never_more_than_the_limit(writes: list[tuple[int, int]]) -> None:
    store = SaltedStore(Box, 40_000)
    sizes: dict[str, int] = {}
    for number, size in writes:
        salt = f"salt {number}"
        box = store.get(salt)
        box.num_bytes = min(size, box.limit)
        store.settle(salt)
        sizes[salt] = SALT_BYTES + len(salt) + box.num_bytes
        assert store.num_bytes <= 40_000
        alive = [salt for salt in sizes if salt in store._values]
        assert store.num_bytes == sum(sizes[salt] for salt in alive)


def test_a_store_that_could_hold_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="shared drafter state"):
        SaltedStore(Box, SALT_BYTES)


def test_generations_keep_what_is_written_again_and_drop_what_is_old() -> None:
    kept: Generations[int, int] = Generations(limit=1000, entry_bytes=50)  # ten in each generation
    for i in range(200):
        kept.put(i, i * i)
        kept.put(-1, i)
        assert kept.num_bytes <= 1000
        assert kept.find(-1) == i and kept.find(i) == i * i
    assert kept.find(0) is None and kept.find(198) is not None


def test_an_entry_may_take_more_and_says_so() -> None:
    kept: Generations[int, int] = Generations(limit=1000, entry_bytes=50)
    assert kept.put(1, 1) and not kept.put(1, 2)
    kept.charge(300)
    assert kept.num_bytes == 350 and kept.find(1) == 2
    kept.put(2, 2)
    kept.charge(100)  # half of the limit: these are the old ones now
    assert kept.num_bytes == 500 and kept.put(1, 3)
    kept.put(3, 3)
    kept.charge(500)
    assert kept.num_bytes == 600 and kept.find(2) is None and kept.find(1) == 3


def test_an_entry_takes_what_it_is_charged_or_less() -> None:
    from engine.drafters import aded, stand, token_recycling

    makers = {
        token_recycling.ROW_BYTES: lambda i: (i, token_recycling.ROW.pack(*range(9))),
        stand.ENTRY_BYTES: lambda i: ((i, i + 7000, i + 90_000), stand.LAW.pack(*range(8), *[0.1] * 8, 1.0)),
        aded.ENTRY_BYTES: lambda i: (i << 32 | 5000, {i: i / 7}),
    }
    for charged, make in makers.items():
        tracemalloc.start()
        mapping: Generations[object, object] = Generations(10**9, charged)
        for i in range(20_000, 32_000):
            mapping.put(*make(i))
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert 0.4 * mapping.num_bytes < taken < 1.02 * mapping.num_bytes, charged


def test_successors_of_a_pair_take_what_they_are_charged_or_less() -> None:
    from engine.drafters import aded

    for successors in range(2, aded.MOST_SUCCESSORS + 1):
        tracemalloc.start()
        kept = {i << 32 | 5000: {1000 * i + j: (i + j) / 7 for j in range(successors)} for i in range(1500)}
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert taken <= len(kept) * (aded.ENTRY_BYTES + aded.SUCCESSOR_BYTES * (successors - 1)), successors
