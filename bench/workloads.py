"""What every peer is asked, and how it is scored. The same prompts in the same order for all of them.

A group is asked of one server from its start to its end. Within a group no prompt comes twice, unless a workload is the
second asking of an earlier one; so a first asking meets no state, however much a server keeps of the past.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from bench.prompts import Prompt, load, mixed

AGAIN = " again"
WARM_UP = "warm-up"


@dataclass(frozen=True, slots=True)
class Workload:
    """`score` names the number of bench.summary that ranks it; the answers run to `max_tokens` when `ignore_eos`."""

    name: str
    concurrency: int
    requests: int
    max_tokens: int
    score: str  # decode_rate: one stream while it decodes; total_rate: all output over the whole run, prefill included
    category: str | None = None  # None: all of them, taking turns
    ignore_eos: bool = False
    skip: int = 0  # prompts of the category, or of the mixture, that others of the group ask

    def prompts(self) -> list[Prompt]:
        if self.category == WARM_UP:
            texts = [f"Name {number} things that are found in a kitchen." for number in range(3, 3 + self.requests)]
            return [Prompt(str(i), WARM_UP, [{"role": "user", "content": text}]) for i, text in enumerate(texts)]
        found = load(categories=[self.category] if self.category else [])
        asked = found if self.category else mixed(found)
        return [asked[(self.skip + i) % len(asked)] for i in range(self.requests)]

    def shortened(self, part: float) -> Workload:
        """The same with a part of the requests, enough of them to fill all streams."""
        return replace(self, requests=max(self.concurrency, math.ceil(self.requests * part)))

    def again(self) -> Workload:
        """The second asking of the same prompts of the same server."""
        return replace(self, name=self.name + AGAIN)


def _mixed(streams: int, requests: int, skip: int = 0) -> Workload:
    return Workload(f"{streams} streams", streams, requests, 128, "total_rate", ignore_eos=True, skip=skip)


# One stream stops where the answer ends: text after the end repeats itself and would flatter every n-gram.
_FIRST = (
    Workload("open", 1, 5, 128, "decode_rate", "open"),
    Workload("copy", 1, 10, 256, "decode_rate", "copy"),
    Workload("math", 1, 5, 128, "decode_rate", "math"),
)
_BATCH = Workload("8 in a batch", 8, 8, 128, "total_rate", ignore_eos=True)

GROUPS: tuple[tuple[Workload, ...], ...] = (
    (*_FIRST, *(workload.again() for workload in _FIRST)),
    (_mixed(1, 7), _mixed(4, 14, skip=7), _mixed(16, 32, skip=21)),
    (_mixed(32, 64),),
    (_BATCH,),
)
WORKLOADS = [workload for group in GROUPS for workload in group]
SERVED = tuple(workload.name for workload in WORKLOADS if workload is not _BATCH)


def named(name: str) -> Workload:
    """The workload of that name; raises ValueError when there is none."""
    for workload in WORKLOADS:
        if workload.name == name:
            return workload
    raise ValueError(f"no workload {name!r}; there are {', '.join(w.name for w in WORKLOADS)}")


def warm_up(streams: int) -> Workload:
    """What a server is asked before the clock starts: prompts that nothing else holds, as many at a time as will come."""
    return Workload(WARM_UP, streams, max(2, streams), 16, "total_rate", WARM_UP, ignore_eos=True)


def chosen(names: Collection[str]) -> list[list[Workload]]:
    """The groups, cut down to the named workloads (none: all); a second asking brings its first along."""
    for name in names:
        named(name)
    needed = {*names, *(name.removesuffix(AGAIN) for name in names)}
    groups = [[workload for workload in group if not names or workload.name in needed] for group in GROUPS]
    return [group for group in groups if group]
