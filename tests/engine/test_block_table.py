"""A block table's array says what its list says, however the table grew and whenever the array was asked for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.block_table import BlockTable, arrays, joined, stacked

BLOCKS = st.lists(st.integers(0, 1000), max_size=40)


@given(first=BLOCKS, grown=st.lists(st.tuples(BLOCKS, st.booleans()), max_size=8))
def test_the_array_follows_the_list(first: list[int], grown: list[tuple[list[int], bool]]) -> None:
    table, plain = BlockTable(first), list(first)
    for more, asked in grown:
        if asked:
            assert table.array.tolist() == plain
        table.extend(more)
        plain += more
    assert table == plain and table.array.tolist() == plain == table.array.tolist()


def test_tables_of_both_kinds_in_one_array() -> None:
    tables: list[list[int]] = [BlockTable([5, 6, 7]), [], [8]]
    assert stacked(tables).tolist() == [[5, 6, 7], [0, 0, 0], [8, 0, 0]]
    assert joined(arrays(tables)).tolist() == [5, 6, 7, 8]
    assert stacked([]).shape == (0, 0) and joined([]).tolist() == []


def test_another_table_shares_nothing() -> None:
    one = BlockTable([1, 2])
    array = one.array
    other = BlockTable(one)
    other.extend([3])
    one.extend([4])
    assert (array.tolist(), one.array.tolist(), other.array.tolist()) == ([1, 2], [1, 2, 4], [1, 2, 3])
