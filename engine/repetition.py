"""Does a text go round in circles? What a model does when it is stuck, and what drafters guess best: speed hides it.

It is no judgement of quality: a table or a list that was asked for may repeat itself as well, so this is counted, and
nobody's answer is ended for it.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

LEAST_TOKENS = 64  # shorter repetitions are ordinary text
LEAST_TIMES = 4
WINDOW = 512  # tokens looked at: a loop of up to 128 tokens is seen; about 0.1 ms once per sequence


def ends_in_a_loop(tokens: Seq[int]) -> bool:
    """Whether the last LEAST_TOKENS or more tokens are one passage LEAST_TIMES or more times in a row.

    The last repetition may be cut short. O(WINDOW): the prefix function (Knuth, Morris, Pratt) of the reversed tail gives
    the shortest period of every ending at once.
    """
    if len(tokens) < LEAST_TOKENS:
        return False
    tail = tokens[: -WINDOW - 1 : -1]
    border = [0] * len(tail)  # longest proper prefix of tail[:i+1] that is also its suffix
    k = 0
    for i in range(1, len(tail)):
        while k and tail[i] != tail[k]:
            k = border[k - 1]
        k += tail[i] == tail[k]
        border[i] = k
        length = i + 1
        if length >= LEAST_TOKENS and (length - k) * LEAST_TIMES <= length:
            return True
    return False
