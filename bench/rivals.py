"""Policies to compare with in the simulation, not for a server: one length for all, and one that knows the answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bench.simulation import Hardware, follow
from engine.plan import StepPlan, StepResult
from engine.protocols import Choice, CostModel, Load, Policy
from engine.sequence import Sequence as TokenSequence
from engine.tree import DraftForest, Verdict


class UniformPolicy(Policy):
    """SmartSpec as its authors' code has it (arXiv 2406.14066; core.md A.1, branch dsd): one k for everybody.

    One acceptance rate for all requests (moving average, 0.85 / 0.15, from 0.7) and, for drafters that look things up, one
    share of requests that have a draft. Every 20 steps the k of the best goodput is chosen, from 0 upwards until it falls; not
    speculating counts 1.1 times. Where that was best twice running, drafting stops and is tried again after 100 steps.
    """

    name = "uniform"
    REFRESH, MARGIN, PROBE = 20, 1.1, 100

    def __init__(self, cost: CostModel, max_budget: int) -> None:
        self._cost, self._most = cost, max_budget
        self._rate, self._matched = 0.7, 1.0
        self._k, self._age, self._zeros = max_budget, 0, 0

    def budgets(self, seqs: Sequence[TokenSequence], load: Load) -> list[int]:
        self._age += 1
        if self._k == 0 and self._zeros >= 2:
            if self._age >= self.PROBE:
                self._k, self._age, self._zeros = self._most, 0, 0
        elif self._age >= self.REFRESH:
            self._k, self._age = self._best(len(seqs), load), 0
            self._zeros = self._zeros + 1 if self._k == 0 else 0
        return [self._k] * len(seqs)

    def learn(self, seqs: Sequence[TokenSequence], forest: DraftForest, verdict: Verdict) -> None:
        sizes = np.diff(forest.start) - 1
        if self._k == 0 or not len(sizes):
            return
        self._matched += 0.15 * (float((sizes > 0).mean()) - self._matched)
        if sizes.sum():
            accepted = sum(len(nodes) for nodes in verdict.nodes)
            self._rate += 0.15 * (accepted / float(sizes.sum()) - self._rate)

    def _best(self, batch: int, load: Load) -> int:
        """The first k after which goodput falls."""
        best, found = -1.0, 0
        drafting, with_draft = self._cost.draft_seconds("ngram", batch, 1), self._matched * batch
        for k in range(self._most + 1):
            a = min(self._rate, 0.999)
            expected = with_draft * (1 - a ** (k + 1)) / (1 - a) + batch - with_draft
            tokens = batch + round(with_draft * k) + load.prefill_tokens
            seconds = self._cost.verify_seconds(tokens, load.context_tokens, max(load.sequences, batch))
            goodput = expected / (seconds + (drafting if k else 0.0)) * (self.MARGIN if k == 0 else 1.0)
            if goodput < best:
                break
            best, found = goodput, k
        return found

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """Its costs are those of the profile."""


class OraclePolicy(Policy):
    """Knows which nodes will stand and what steps really take, and shows the target those that pay. It cannot be beaten here.

    (By less than what drafting costs: it drafts at every step.)
    """

    name = "oracle"

    def __init__(self, hardware: Hardware, answers: dict[str, list[int]], max_budget: int) -> None:
        self._hardware, self._answers, self._most = hardware, answers, max_budget

    def budgets(self, seqs: Sequence[TokenSequence], load: Load) -> list[int]:
        return [self._most] * len(seqs)

    def trim(self, forest: DraftForest, seqs: Sequence[TokenSequence], load: Load) -> Choice:
        verdict = follow(forest, [self._answers[seq.request.request_id][seq.num_output :] for seq in seqs])
        standing = [int(forest.start[b]) + node for b, nodes in enumerate(verdict.nodes) for node in nodes]
        batch, fed = len(seqs), len(seqs) + load.prefill_tokens
        goodput = [
            (batch + q) / (self._hardware.verify(fed + q, load.context_tokens, load.sequences) + load.draft_seconds)
            for q in range(len(standing) + 1)
        ]
        kept = np.zeros(forest.num_nodes, dtype=bool)
        kept[forest.start[:-1]] = True
        kept[standing[: int(np.argmax(goodput))]] = True
        cut = forest.keep(kept)
        dropped = (np.diff(forest.start) - np.diff(cut.start)).tolist()
        return Choice(cut, dropped, [""] * len(seqs))
