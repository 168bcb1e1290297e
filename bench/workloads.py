"""What every peer is asked, and how it is scored. The same prompts in the same order for all of them."""

from __future__ import annotations

from dataclasses import dataclass

from bench.prompts import Prompt, load, mixed


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

    def prompts(self) -> list[Prompt]:
        found = load(categories=[self.category] if self.category else [])
        asked = found if self.category else mixed(found)
        return [asked[i % len(asked)] for i in range(self.requests)]


def _mixed(streams: int, requests: int) -> Workload:
    return Workload(f"{streams} streams", streams, requests, 128, "total_rate", ignore_eos=True)


# One stream stops where the answer ends: text after the end repeats itself and would flatter every n-gram.
WORKLOADS = [
    Workload("open", 1, 5, 128, "decode_rate", "open"),
    Workload("copy", 1, 10, 256, "decode_rate", "copy"),
    Workload("math", 1, 5, 128, "decode_rate", "math"),
    _mixed(1, 7),
    _mixed(4, 14),
    _mixed(16, 32),
    _mixed(32, 64),
]
