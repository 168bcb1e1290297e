"""A rank that goes wrong: `python -m tests.engine.wrong_rank`. A request named "odd" gets another block in its sixth step."""

from __future__ import annotations

import sys

from engine.executors import rank_process
from engine.plan import StepPlan
from engine.sequence import Sequence
from engine.worker import Worker

_apply = Worker.apply


def apply_wrongly(self: Worker, plan: StepPlan) -> list[Sequence]:
    seqs = _apply(self, plan)
    for seq in seqs:
        if seq.request.request_id == "odd" and seq.num_output == 5:
            seq.block_ids[-1] += 1
    return seqs


if __name__ == "__main__":
    Worker.apply = apply_wrongly  # type: ignore[method-assign]
    sys.exit(rank_process.main())
