"""A rank that is in no hurry: `python -m tests.engine.slow_rank`. Before what it hears it waits for 0 to 200 ms, at random."""

from __future__ import annotations

import random
import sys
import time

from engine.executors import rank_process
from engine.parallel import Group

_hear = Group.hear


def hear_late(self: Group) -> bytes:
    told = _hear(self)
    time.sleep(random.random() / 5)
    return told


if __name__ == "__main__":
    Group.hear = hear_late  # type: ignore[method-assign]
    sys.exit(rank_process.main())
