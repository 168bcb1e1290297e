"""Engines over one loaded model: tests change drafters, pools and policies without loading the weights again."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.drafting import Drafting
from engine.engine import Engine
from engine.messages import SequenceUsage, TokenLogprobs
from engine.plan import StepPlan, StepResult
from engine.protocols import NO_SIGNALS, Choice, Drafter, Load, Observed, Policy, Siblings
from engine.registry import make_drafter
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from engine.verification import Verification
from engine.worker import Worker


class SharedExecutor:
    """An executor whose worker outlives it; `num_blocks` makes the pool small, which forces preemptions."""

    def __init__(self, worker: Worker, config: EngineConfig, num_blocks: int | None) -> None:
        """The scheduler's limits are those of `config`, not of the configuration that the worker was made with."""
        self.worker = worker
        limits = {"max_num_seqs": config.max_num_seqs, "max_num_batched_tokens": config.max_num_batched_tokens}
        if num_blocks is not None:
            limits["num_blocks"] = num_blocks
        self.info = msgspec.structs.replace(worker.info, **limits)

    def guide(self, policy: Policy) -> None:
        self.worker.guide(policy)

    def execute(self, plan: StepPlan) -> StepResult:
        return self.worker.step(plan)

    def close(self) -> None:
        self.worker.close()


def load_worker(path: Path, dtype: str = "float32", **options: Any) -> Worker:
    return Worker(
        EngineConfig(model=str(path), dtype=dtype, drafters=[], num_threads=1, kv_cache_memory_bytes=256 << 20, **options)
    )  # type: ignore[arg-type]  # dtype is a Literal


def make_engine(
    worker: Worker,
    drafters: Seq[str | Drafter] = (),
    *,
    budget: int = 6,
    num_blocks: int | None = None,
    policy: str | Policy = "fixed",
    **options: Any,
) -> Engine:
    """A fresh engine (pool, scheduler, drafters, policy) over a worker that is idle."""
    worker.drop(list(worker.seqs))
    made = [make_drafter(d) if isinstance(d, str) else d for d in drafters]
    worker.drafting = Drafting(made, worker.info.vocab_size)
    name = policy if isinstance(policy, str) else "fixed"
    config = msgspec.structs.replace(
        worker.config, policy=name if made else "off", budget=budget, check_integrity=True, **options
    )
    worker.verification = Verification(config, made)
    return Engine(config, SharedExecutor(worker, config, num_blocks), None if isinstance(policy, str) else policy)


@dataclass
class Answer:
    """Everything one sequence told its client."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    usage: SequenceUsage | None = None


def answers(engine: Engine, requests: Seq[Request]) -> dict[tuple[str, int], Answer]:
    """Run the requests together until the engine is idle; it must then hold no block."""
    out: dict[tuple[str, int], Answer] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for delta in engine.step():
            answer = out.setdefault((delta.request_id, delta.index), Answer())
            assert answer.finish_reason is None, "a delta after the final one"
            answer.tokens += delta.token_ids
            answer.logprobs += delta.logprobs or []
            answer.prompt_logprobs = delta.prompt_logprobs or answer.prompt_logprobs
            answer.finish_reason, answer.usage = delta.finish_reason, delta.usage
    assert engine.stats().blocks_used == 0
    return out


def request(name: str, prompt: list[int], **params: Any) -> Request:
    extra = {key: params.pop(key) for key in ("n", "prediction_ids", "cache_salt", "priority") if key in params}
    return Request(request_id=name, prompt_ids=prompt, params=SamplingParams(**params), **extra)


class WhimsicalPolicy(Policy):
    """Changes budgets at random, asks drafters at random (so trees are fused) and drops drafted nodes at random."""

    name = "whimsical"

    def __init__(self, most: int = 9, seed: int = 0) -> None:
        self.most, self.rng = most, np.random.default_rng(seed)
        self.dropped = self.fused = 0

    def budgets(self, seqs: Seq[Sequence], load: Load) -> list[int]:
        return [int(self.rng.integers(0, self.most + 1)) for _ in seqs]

    def allot(self, drafter: Drafter, seqs: Seq[Sequence], budgets: Seq[int], gained: Seq[float | None], load: Load) -> list[int]:
        asked = [int(self.rng.integers(0, budget + 1)) for budget in budgets]
        self.fused += sum(bool(count) and gain is not None for count, gain in zip(asked, gained, strict=True))
        return asked

    def estimate(self, drafter: str, seqs: Seq[Sequence], forest: DraftForest) -> NDArray[np.float64]:
        return np.where(forest.parent < 0, 1.0, self.rng.uniform(0.01, 0.99, size=forest.num_nodes))

    def trim(self, forest: DraftForest, seqs: Seq[Sequence], load: Load) -> Choice:
        kept = self.rng.random(forest.num_nodes) < 0.8
        kept[forest.start[:-1]] = True
        for b in range(forest.num_trees):
            first = int(forest.start[b])
            for node in range(first + 1, first + forest.size(b)):
                kept[node] &= kept[first + forest.parent[node]]
        cut = forest.keep(kept)
        dropped = (np.diff(forest.start) - np.diff(cut.start)).tolist()
        self.dropped += sum(dropped)
        return Choice(cut, dropped, ["goodput"] * forest.num_trees)


class GarbageDrafter:
    """Random trees of random tokens, some of them the very tokens that are likely, siblings repeated now and then."""

    name = "garbage"
    needs = NO_SIGNALS
    siblings = Siblings.POINT

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self.rng, self.vocab_size = np.random.default_rng(seed), vocab_size

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        trees = []
        for seq, budget in zip(seqs, budgets, strict=True):
            size = int(self.rng.integers(0, budget + 1))
            picks = [
                int(self.rng.choice(seq.tokens)) if self.rng.random() < 0.5 else int(self.rng.integers(self.vocab_size))
                for _ in range(size)
            ]
            trees.append(([seq.tokens[-1], *picks], [-1, *(int(self.rng.integers(0, node + 1)) for node in range(size))]))
        return DraftForest.from_parents(trees, [self.name] * len(trees))

    def observe(self, seqs: Seq[Sequence], forest: DraftForest, verdict: Verdict, signals: Observed) -> None:
        pass

    def forget(self, seq_id: int) -> None:
        pass


class OracleDrafter(GarbageDrafter):
    """Knows the answers and hides them in branched trees: long paths are accepted and have to be packed in the KV cache."""

    name = "oracle"

    def __init__(self, vocab_size: int, known: dict[tuple[str, int], list[int]], seed: int = 0) -> None:
        super().__init__(vocab_size, seed)
        self.known = known

    def draft(self, seqs: Seq[Sequence], budgets: Seq[int]) -> DraftForest:
        trees = []
        for seq, budget in zip(seqs, budgets, strict=True):
            truth = self.known[seq.request.request_id, seq.sample_index][seq.num_output :]
            tokens, parents, tip = [seq.tokens[-1]], [-1], 0
            while len(tokens) <= budget:
                depth = 0 if tip == 0 else self._depth(parents, tip)
                if depth < len(truth) and self.rng.random() < 0.6:  # the truth, below the truth so far
                    tokens.append(truth[depth])
                    parents.append(tip)
                    tip = len(tokens) - 1
                else:  # a wrong sibling anywhere, so that node order and depth differ
                    tokens.append(int(self.rng.integers(self.vocab_size)))
                    parents.append(int(self.rng.integers(0, len(parents))))
            trees.append((tokens, parents))
        return DraftForest.from_parents(trees, [self.name] * len(trees))

    @staticmethod
    def _depth(parents: list[int], node: int) -> int:
        depth = 0
        while node > 0:
            node, depth = parents[node], depth + 1
        return depth
