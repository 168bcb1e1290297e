"""No token id reaches the engine unchecked: one id outside the vocabulary can bring down a device kernel."""

from __future__ import annotations

from collections.abc import Collection

from server.openai.errors import invalid


def check_ids(ids: Collection[int], vocab_size: int, param: str) -> None:
    """`ids` holds integers. Raises ApiError 400 for one outside 0 .. vocab_size - 1."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise invalid(f"Invalid '{param}': every token id must lie between 0 and {vocab_size - 1}.", param)


def all_integers(values: list[object]) -> bool:
    """True for integers alone; a boolean is none. One pass in C: a prompt may have a million ids."""
    return set(map(type, values)) <= {int}
