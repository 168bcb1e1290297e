"""The engine's scheduler, drafters and policy over recorded answers, on a machine that is a formula: steps without a model.

What stands of a draft is looked up in the answer that was recorded; what a step takes comes from a `Hardware`, with noise and
now and then a step that the operating system put aside; time is a number. Everything that decides is the engine's own code:
Scheduler, BlockPool, Drafting, the drafters, the policy and its cost model, which it has to profile and correct like any other.
Source: core.md J.7. Not simulated: preemption by memory (the pool is large), the prefix cache (off), HTTP.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import msgspec

from bench.arithmetic import percentile, poisson_arrivals
from bench.recording import Recorded
from bench.waves import Wave
from engine.blocks import BlockPool
from engine.drafting import Drafting
from engine.messages import EngineInfo
from engine.plan import RowResult, StepPlan, StepResult, StepTimes
from engine.probe import Probe
from engine.protocols import Drafter, Load, Observed, Policy
from engine.request import Request, SamplingParams
from engine.row_result import row_result
from engine.scheduler import Scheduler
from engine.sequence import Sequence as TokenSequence
from engine.tree import DraftForest, Verdict

BLOCK_SIZE = 16
VOCAB_SIZE = 1 << 20


class Hardware(Protocol):
    """What things really take, in seconds."""

    @property
    def name(self) -> str: ...

    def verify(self, tokens: int, context_tokens: int, sequences: int) -> float: ...

    def draft(self, sequences: int, depth: int) -> float: ...


@dataclass
class World:
    """The time, and how unevenly it passes."""

    hardware: Hardware
    noise: float = 0.03  # standard deviation of the logarithm of a step's time
    stalls: float = 0.002  # share of the steps that take ten times as long
    seed: int = 0
    now: float = 0.0
    stalled: float = 0.0  # seconds that stalls took beyond what the steps would have: chance, and no policy's doing

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)

    def clock(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> float:
        """Let about this much time pass; returns how much it was."""
        real = seconds * self._rng.lognormvariate(0.0, self.noise)
        if self._rng.random() < self.stalls:
            self.stalled += 9 * real
            real *= 10
        self.now += real
        return real

    # As an executor that can be profiled (engine/costs.py):

    def probe(self, probe: Probe) -> float:
        sequences = probe.sequences + bool(probe.prompt)
        return self.pass_(self.hardware.verify(probe.tokens, probe.context * probe.sequences, sequences))


class Paced:
    """A drafter whose drafts take the hardware's time. Its learning is free, as in `Hardware` nothing says otherwise."""

    def __init__(self, drafter: Drafter, world: World) -> None:
        self._drafter, self._world = drafter, world
        self.name, self.needs, self.siblings = drafter.name, drafter.needs, drafter.siblings

    def draft(self, seqs: Sequence[TokenSequence], budgets: Sequence[int]) -> DraftForest:
        forest = self._drafter.draft(seqs, budgets)
        self._world.now += self._world.hardware.draft(len(seqs), max(int(forest.depth.max(initial=0)), 1))
        return forest

    def observe(self, seqs: Sequence[TokenSequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        self._drafter.observe(seqs, forest, verdict, signals)

    def forget(self, seq_id: int) -> None:
        self._drafter.forget(seq_id)


class ReplayExecutor:
    """One worker's step (engine/worker.py) with the answers known and the model's time made up."""

    def __init__(self, info: EngineInfo, drafters: Sequence[Drafter], world: World) -> None:
        self.info, self.world = info, world
        self.answers: dict[str, list[int]] = {}
        self.policy: Policy | None = None
        self._drafting = Drafting([Paced(d, world) for d in drafters], info.vocab_size, clock=world.clock)
        self._seqs: dict[int, TokenSequence] = {}

    def guide(self, policy: Policy) -> None:
        self.policy = policy

    def execute(self, plan: StepPlan) -> StepResult:
        assert self.policy is not None
        for seq_id in plan.removed:
            del self._seqs[seq_id]
            self._drafting.forget(seq_id)
            self.policy.forget(seq_id)
        for new in plan.new:
            self._seqs[new.seq_id] = TokenSequence(new.seq_id, new.request, new.sample_index)
        seqs = [self._seqs[row.seq_id] for row in plan.rows]
        for seq, row in zip(seqs, plan.rows, strict=True):
            seq.num_computed = row.num_computed
        judged = [i for i, (seq, row) in enumerate(zip(seqs, plan.rows, strict=True)) if row.num_new == seq.num_uncomputed]
        trees = [seqs[i] for i in judged]
        fed, context = sum(row.num_new for row in plan.rows), sum(row.num_computed for row in plan.rows)
        load = Load(fed - len(judged), 0, BLOCK_SIZE, context, len(seqs))
        forest = self._drafting.draft(trees, [plan.rows[i].budget for i in judged], self.policy, load)
        draft_seconds = self._drafting.take_seconds()
        drafting = sum(draft_seconds.values())
        load = Load(fed - len(judged), 0, BLOCK_SIZE, context, len(seqs), drafting)
        choice = self.policy.trim(forest, trees, load)
        forest = choice.forest
        tokens = fed + forest.num_drafts
        forward = self.world.pass_(self.world.hardware.verify(tokens, context, len(seqs)))
        verdict = follow(forest, [self.answers[seq.request.request_id][seq.num_output :] for seq in trees])
        self.policy.learn(trees, forest, verdict)
        self._drafting.observe(trees, forest, verdict, Observed())
        results = [RowResult(row.seq_id, []) for row in plan.rows]
        for tree, i in enumerate(judged):
            results[i] = row_result(plan.rows[i].seq_id, choice, verdict, tree)
        for seq, row, result in zip(seqs, plan.rows, results, strict=True):
            seq.num_computed = row.num_computed + row.num_new + result.num_accepted
            seq.commit(result.token_ids)
        times = StepTimes(draft=drafting, forward=forward)
        return StepResult(results, times, tokens, self._drafting.take_fallbacks(), draft_seconds, choice.tokens, choice.seconds)

    def close(self) -> None:
        self._seqs.clear()


def follow(forest: DraftForest, truths: Iterable[Sequence[int]]) -> Verdict:
    """The verdict when tree b's target says truths[b] from its root on."""
    nodes: list[list[int]] = []
    tokens: list[list[int]] = []
    for tree, truth in enumerate(truths):
        part = forest.nodes(tree)
        below: dict[tuple[int, int], int] = {}
        for i, (token, parent) in enumerate(zip(forest.token[part].tolist(), forest.parent[part].tolist(), strict=True)):
            below.setdefault((parent, token), i)
        at = 0
        path: list[int] = []
        while len(path) < len(truth) - 1 and (at, truth[len(path)]) in below:
            at = below[at, truth[len(path)]]
            path.append(at)
        nodes.append(path)
        tokens.append(list(truth[: len(path) + 1]))
    return Verdict(nodes, tokens)


@dataclass(slots=True)
class Served:
    """One request. Seconds of the simulation's clock."""

    category: str
    arrival: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0

    @property
    def tpot(self) -> float:
        return (self.last - self.first) / (self.tokens - 1)


@dataclass(slots=True)
class Step:
    """One step as a picture needs it."""

    time: float
    sequences: int
    drafts: int
    committed: int


@dataclass
class Outcome:
    """What one policy did with one load.

    Tokens and seconds are those of the steps that count: in a closed run the steady state, after the first round of requests
    and before they run out. `busy`: seconds in which there was work, stalls apart.
    """

    tokens: int = 0
    busy: float = 0.0
    drafted: int = 0
    accepted: int = 0
    served: list[Served] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Committed tokens per second of work."""
        return self.tokens / self.busy

    def tpot(self, p: float) -> float:
        """Percentile of the seconds per token after the first."""
        return percentile([one.tpot for one in self.served if one.tokens > 1], p)


class Simulation:
    """One policy on one machine; `closed`, `waves` and `open` run a load and say what came of it."""

    def __init__(self, policy: Policy, executor: ReplayExecutor) -> None:
        info = executor.info
        self.policy, self.executor, self.world = policy, executor, executor.world
        executor.guide(policy)
        self._scheduler = Scheduler(
            BlockPool(info.num_blocks, info.block_size, enable_prefix_caching=False),
            policy,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
        )
        self._served: dict[str, Served] = {}
        self._count = 0

    def closed(self, recorded: Sequence[Recorded], concurrency: int, *, whole: bool = False) -> Outcome:
        """A fixed number of requests at any time: as one ends the next comes. Takes at least three times as many requests.

        whole: what comes before and after the steady state counts as well.
        """
        if len(recorded) < 3 * concurrency:
            raise ValueError(f"{len(recorded)} requests have no steady state with {concurrency} at a time")
        outcome, waiting = Outcome(), list(recorded)[::-1]
        for i in range(1, concurrency + 1):  # caught at any point of their lives, or they would all begin and end together
            waiting[-i] = cut(waiting[-i], i / (concurrency + 1))
        first = len(recorded) - 2 * concurrency  # as many as are in flight have ended, and others taken their places
        while waiting or self._scheduler.has_work():
            while waiting and self._scheduler.num_running + self._scheduler.num_waiting < concurrency:
                self._add(waiting.pop(), self.world.now)
            self._step(outcome, counts=whole or 0 < len(waiting) <= first)
        return self._finished(outcome)

    def waves(self, recorded: Sequence[Recorded], schedule: Iterable[Wave]) -> Outcome:
        """Requests in flight follow a schedule; every step counts, from the first prompt to the last token."""
        outcome, coming = Outcome(), iter(recorded)
        for wave in schedule:
            for one in islice(coming, wave.requests):
                while self._scheduler.num_running + self._scheduler.num_waiting >= wave.at_a_time:
                    self._step(outcome)
                self._add(one, self.world.now)
        while self._scheduler.has_work():
            self._step(outcome)
        return self._finished(outcome)

    def open(self, recorded: Sequence[Recorded], rate: float, seed: int = 0) -> Outcome:
        """Requests come by a Poisson process with `rate` per second, whatever the state of the engine."""
        outcome, began = Outcome(), self.world.now
        due = [(began + at, one) for at, one in zip(poisson_arrivals(rate, len(recorded), seed), recorded, strict=True)][::-1]
        while due or self._scheduler.has_work():
            if not self._scheduler.has_work():
                self.world.now = max(self.world.now, due[-1][0])
            while due and due[-1][0] <= self.world.now:
                self._add(due[-1][1], due[-1][0])
                due.pop()
            self._step(outcome)
        return self._finished(outcome)

    def _add(self, one: Recorded, arrival: float) -> None:
        name = f"{self._count}:{one.id}"
        self._count += 1
        self.executor.answers[name] = one.answer
        self._served[name] = Served(one.category, arrival)
        params = SamplingParams(max_tokens=len(one.answer), temperature=0.0, ignore_eos=True)
        self._scheduler.add(Request(request_id=name, prompt_ids=one.prompt, params=params))

    def _step(self, outcome: Outcome, counts: bool = True) -> None:
        """engine/engine.py's step, on our clock."""
        began, stalled = self.world.now, self.world.stalled
        plan = self._scheduler.schedule()
        assert plan is not None
        result = self.executor.execute(plan)
        deltas = self._scheduler.commit(plan, result)
        seconds = self.world.now - began
        self.policy.observe(plan, result, seconds)
        committed = 0
        for delta in deltas:
            served, count = self._served[delta.request_id], len(delta.token_ids)
            served.first = served.first or self.world.now
            served.last = self.world.now
            served.tokens += count
            committed += count
        if not counts:
            return
        drafted = sum(row.num_draft for row in result.rows)
        outcome.tokens += committed
        outcome.busy += seconds - (self.world.stalled - stalled)
        outcome.drafted += drafted
        outcome.accepted += sum(row.num_accepted for row in result.rows)
        outcome.steps.append(Step(self.world.now, sum(bool(row.token_ids) for row in result.rows), drafted, committed))

    def _finished(self, outcome: Outcome) -> Outcome:
        outcome.served = list(self._served.values())
        self._served = {}
        return outcome


def cut(one: Recorded, share: float) -> Recorded:
    """The last part of an answer: what came before counts as prompt."""
    begin = int(len(one.answer) * share)
    return msgspec.structs.replace(one, prompt=one.prompt + one.answer[:begin], answer=one.answer[begin:])


def make_info(max_num_seqs: int = 128, max_num_batched_tokens: int = 512, num_blocks: int = 40_000) -> EngineInfo:
    """An engine with memory for everybody."""
    return EngineInfo(
        model="recorded", architecture="replay", vocab_size=VOCAB_SIZE, max_model_len=8192, dtype="none", device="cpu",
        backend="none", drafters=[], verifier="match", lossless=True, policy="", budget=0, weight_bytes=1 << 28,
        kv_bytes=1 << 28, num_blocks=num_blocks, block_size=BLOCK_SIZE, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens, load_seconds=0.0,
    )  # fmt: skip
