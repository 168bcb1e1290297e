"""One step of a given shape, run for its time alone. Only before the engine has requests: it borrows their KV blocks.

What the blocks hold afterwards is finite and belongs to nobody: no sequence has them, no prefix hash leads to them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import msgspec

from engine.drafting import Drafting
from engine.plan import NewSequence, Row, StepPlan
from engine.protocols import NO_SIGNALS, Observed, Siblings
from engine.registry import make_policy
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict

if TYPE_CHECKING:
    from engine.messages import EngineInfo
    from engine.worker import Worker

STRIDE = 7919  # between one token id and the next: embedding rows far apart, as in a text


class Probe(msgspec.Struct, frozen=True, array_like=True):
    """The shape of a step: plain integers, so that every rank can be told to run it."""

    sequences: int  # that decode
    nodes: int  # draft nodes of each
    context: int  # tokens of each one's context; a multiple of the block size
    prompt: int = 0  # rows of one more sequence, a prompt chunk that is not judged

    @property
    def tokens(self) -> int:
        return self.sequences * (1 + self.nodes) + self.prompt

    def blocks(self, block_size: int) -> int:
        """KV blocks that it borrows. The context is the same for all of its sequences: it is only read."""
        own = self.sequences * -(-(1 + self.nodes) // block_size) + -(-self.prompt // block_size)
        return self.context // block_size + own

    def fits(self, info: EngineInfo) -> bool:
        """Whether an engine with these limits could be asked to run such a step."""
        longest = self.context + max(1 + self.nodes, self.prompt) + 1
        return (
            self.blocks(info.block_size) <= info.num_blocks
            and longest <= info.max_model_len
            and self.tokens <= info.max_num_batched_tokens
            and self.sequences + bool(self.prompt) <= info.max_num_seqs
        )


class FullDrafter:
    """Guesses exactly as far as it may, the first token of the prompt over and over."""

    name = "full"
    needs = NO_SIGNALS
    siblings = Siblings.POINT

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        chains = [[seq.tokens[0]] * budget for seq, budget in zip(seqs, budgets, strict=True)]
        return DraftForest.from_chains([seq.tokens[-1] for seq in seqs], chains, [self.name] * len(seqs))

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        pass

    def forget(self, seq_id: int) -> None:
        pass


def make_plan(probe: Probe, block_size: int, vocab_size: int) -> StepPlan:
    """A first and last step of sequences with negative ids, in blocks 0, 1, 2, ..."""
    shared = list(range(probe.context // block_size))
    next_block = len(shared)
    plan = StepPlan(0, [], [], [])

    def add(context: list[int], fed: int, length: int, budget: int) -> None:
        nonlocal next_block
        count = -(-(fed + budget) // block_size)
        own = list(range(next_block, next_block + count))
        next_block += count
        tokens = [1 + i * STRIDE % (vocab_size - 1) for i in range(length)]
        params = SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True)
        name = -1 - len(plan.rows)
        plan.new.append(NewSequence(name, Request(request_id=str(name), prompt_ids=tokens, params=params), 0))
        plan.rows.append(Row(name, len(context) * block_size, fed, budget, [*context, *own], True))

    for _ in range(probe.sequences):
        add(shared, 1, probe.context + 1, probe.nodes)
    if probe.prompt:
        add([], probe.prompt, probe.prompt + 1, 0)  # its last token stays unfed, so no row of it is judged
    return plan


def run_probe(worker: Worker, probe: Probe) -> float:
    """Seconds of one step of this shape on this rank, drafting apart. The worker must be idle."""
    plan = make_plan(probe, worker.info.block_size, worker.info.vocab_size)
    drafting, worker.drafting = worker.drafting, Drafting([FullDrafter()], worker.info.vocab_size)
    policy, worker.policy = worker.policy, make_policy("fixed")  # drops no draft
    try:
        started = time.perf_counter()
        result = worker.step(plan)
        seconds = time.perf_counter() - started - result.times.draft
    finally:
        worker.drop([row.seq_id for row in plan.rows])
        worker.drafting, worker.policy = drafting, policy
    return seconds


def tokens_probe(tokens: int) -> Probe:
    """A step of so many rows as decoding would have it: one sequence up to 32, then several with 15 draft nodes each.

    What does not divide evenly comes as a prompt chunk.
    """
    if tokens <= 32:
        return Probe(1, tokens - 1, 0)
    return Probe(tokens // 16, 15, 0, tokens % 16)
