"""A little world for policies: drafters whose chains stand with known probabilities, and steps that cost what a formula says."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.drafting import Drafting
from engine.plan import Row, RowResult, StepPlan, StepResult, StepTimes
from engine.protocols import NO_SIGNALS, Choice, Load, Observed, Policy, Siblings
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from tests.fakes import VOCAB_SIZE, make_request

RIGHT, WRONG = 7, 8  # tokens: what the model says, and what it does not

# (sequence, depth) -> P(the node stands | its parent stands)
Odds = Callable[[Sequence, int], float]


@dataclass
class FormulaCost:
    """Seconds of a step by a formula; drafters by name. It learns nothing: it is right."""

    verify: Callable[[NDArray[np.float64]], NDArray[np.float64]]
    draft: dict[str, Callable[[int, int], float]] = field(default_factory=dict)

    measured = False  # learns from every step

    def verify_seconds(self, tokens: int | NDArray[np.int64], context_tokens: int, sequences: int) -> float | NDArray[np.float64]:
        found = self.verify(np.asarray(tokens, dtype=np.float64))
        return found if isinstance(tokens, np.ndarray) else float(found)

    def draft_seconds(self, drafter: str, sequences: int, depth: int) -> float:
        return self.draft.get(drafter, lambda n, d: 0.0)(sequences, depth)

    def observe(self, tokens: int, context_tokens: int, sequences: int, seconds: float) -> None:
        pass

    def observe_draft(self, drafter: str, sequences: int, depth: int, seconds: float) -> None:
        pass


def affine_cost(fixed: float = 0.005, token: float = 0.0002, **draft: Callable[[int, int], float]) -> FormulaCost:
    return FormulaCost(lambda n: fixed + token * n, draft)


class ChainDrafter:
    """Chains that use up their budget, whose nodes stand as `odds` says; the truth is drawn with them."""

    needs = NO_SIGNALS
    siblings = Siblings.POINT

    def __init__(self, name: str, odds: Odds, seed: int = 0, costly: bool = False) -> None:
        self.name, self.odds, self.rng, self.costly = name, odds, np.random.default_rng(seed), costly
        self.asked = 0

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        self.asked += 1
        chains = []
        for seq, budget in zip(seqs, budgets, strict=True):
            stands = [self.rng.random() < self.odds(seq, depth) for depth in range(1, budget + 1)]
            chains.append([RIGHT if stood else WRONG for stood in stands])
        return DraftForest.from_chains([seq.tokens[-1] for seq in seqs], chains, [self.name] * len(seqs))

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        pass

    def forget(self, seq_id: int) -> None:
        pass


class World:
    """Steps of a policy over sequences that never end. `clock` is the time that the formula says has passed."""

    def __init__(self, policy: Policy, cost: FormulaCost, drafters: Seq[ChainDrafter], count: int = 1) -> None:
        self.policy, self.cost, self.names = policy, cost, [d.name for d in drafters]
        self.clock = self.draft_clock = 0.0
        self.drafting = Drafting(drafters, VOCAB_SIZE, clock=lambda: self.draft_clock)
        for drafter in drafters:
            self._charge(drafter)
        self.seqs = [self.sequence(i) for i in range(count)]
        self.tokens = self.steps = self.shown = self.accepted = 0
        self.choice: Choice | None = None
        self.verdict = Verdict([], [])

    @staticmethod
    def sequence(seq_id: int) -> Sequence:
        return Sequence(seq_id, make_request(f"r{seq_id}", max_tokens=10**9))

    def _charge(self, drafter: ChainDrafter) -> None:
        """Drafting takes the time that the formula says."""
        draft = drafter.draft

        def charged(seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
            forest = draft(seqs, budgets)
            self.draft_clock += self.cost.draft_seconds(drafter.name, len(seqs), int(forest.depth.max(initial=1)))
            return forest

        drafter.draft = charged  # type: ignore[method-assign]  # a test's own drafter

    @property
    def goodput(self) -> float:
        return self.tokens / self.clock

    def run(self, steps: int, prefill: int = 0) -> World:
        for _ in range(steps):
            self.step(prefill)
        return self

    def reset_counts(self) -> None:
        self.tokens = self.steps = self.shown = self.accepted = 0
        self.clock = 0.0

    def step(self, prefill: int = 0) -> None:
        seqs, before = self.seqs, self.draft_clock
        load = Load(prefill, 1000, 16, 100 * len(seqs), len(seqs))
        budgets = self.policy.budgets(seqs, load)
        forest = self.drafting.draft(seqs, budgets, self.policy, load)
        spent = self.draft_clock - before
        self.choice = choice = self.policy.trim(forest, seqs, Load(prefill, 0, 16, 100 * len(seqs), len(seqs), spent))
        self.verdict = verdict = truth(choice.forest)
        self.policy.learn(seqs, choice.forest, verdict)
        rows = choice.forest.num_nodes + prefill
        seconds = float(self.cost.verify_seconds(rows, 0, 0)) + spent
        plan = StepPlan(1, [], [Row(seq.seq_id, 100, 1, b, [], False) for seq, b in zip(seqs, budgets, strict=True)], [])
        results = [RowResult(seq.seq_id, tokens) for seq, tokens in zip(seqs, verdict.tokens, strict=True)]
        times = StepTimes(draft=spent)
        result = StepResult(results, times, rows, {}, self.drafting.take_seconds(), choice.tokens, choice.seconds)
        self.policy.observe(plan, result, seconds)
        self.clock += seconds
        self.steps += 1
        self.shown += choice.forest.num_drafts
        self.tokens += sum(len(tokens) for tokens in verdict.tokens)
        self.accepted += sum(len(nodes) for nodes in verdict.nodes)


def truth(forest: DraftForest) -> Verdict:
    """Nodes that carry RIGHT stand: it is what the target says everywhere."""
    nodes: list[list[int]] = []
    for b in range(forest.num_trees):
        part, path, node = forest.nodes(b), [], 0
        while True:
            below = [
                i
                for i in range(1, part.stop - part.start)
                if forest.parent[part.start + i] == node and forest.token[part.start + i] == RIGHT
            ]
            if not below:
                break
            node = below[0]
            path.append(node)
        nodes.append(path)
    return Verdict(nodes, [[RIGHT] * (len(path) + 1) for path in nodes])
