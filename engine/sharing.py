"""Shares what is too little fairly."""

from __future__ import annotations

from collections.abc import Sequence


def share_out(wants: Sequence[int], total: int, first: int = 0) -> list[int]:
    """Grants of at most `wants[i]` whose sum is at most `total`, the smallest as large as can be (max-min fair).

    What does not divide evenly goes to those after position `first`, one each, so that a caller who moves `first` on
    favours nobody for long.
    """
    if sum(wants) <= total:
        return list(wants)
    level, left, open_wants = 0, max(total, 0), sorted(wants)
    for i, want in enumerate(open_wants):
        share = left // (len(open_wants) - i)
        if want > share:
            level = share
            break
        left -= want
    grants = [min(want, level) for want in wants]
    rest = max(total, 0) - sum(grants)
    for i in range(len(wants)):
        j = (first + i) % len(wants)
        if not rest:
            break
        if grants[j] < wants[j]:
            grants[j] += 1
            rest -= 1
    return grants
