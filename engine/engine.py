"""The engine on one screen: schedule, execute, commit. No process, no socket, no text."""

from __future__ import annotations

import logging
import time

from engine.blocks import BlockPool, IntegrityError
from engine.config import EngineConfig
from engine.costs import Costs
from engine.messages import EngineStats, TokenDelta
from engine.protocols import Executor, Policy, Studies, Watched
from engine.registry import make_policy, wants_cost
from engine.request import Request
from engine.scheduler import Scheduler
from engine.stats import StatsRecorder
from engine.validate import check_request

logger = logging.getLogger("outrider.engine")


class Engine:
    """Turns requests into token deltas, one step at a time."""

    def __init__(self, config: EngineConfig, executor: Executor | None = None, policy: Policy | None = None) -> None:
        """Loads the model into this process unless an executor is given; a policy given is used for the configured one.

        Raises ValueError for a bad configuration.
        """
        if executor is None:
            from engine.executors.make import make_executor  # torch is needed only where a model runs

            executor = make_executor(config)
        info = executor.info
        self.config = config
        self.executor = executor
        self._watched = executor if isinstance(executor, Watched) else None
        self.info = info
        self.costs = Costs(config, executor, info) if policy is None and wants_cost(config.policy) else None
        self.policy = policy or self._make_policy()
        executor.guide(self.policy)
        self.recorder = StatsRecorder()
        self.pool = BlockPool(info.num_blocks, info.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.pool,
            self.policy,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
            eos_ids=frozenset(info.eos_ids),
            recorder=self.recorder,
            prediction_drafters=frozenset(info.prediction_drafters),
        )

    def _make_policy(self) -> Policy:
        config = self.config
        cost = {} if self.costs is None else {"cost": self.costs.model}
        return make_policy(
            config.policy,
            budget=config.budget,
            max_budget=config.max_budget,
            max_itl_ms=config.max_itl_ms,
            drafters=self.info.drafters,
            **cost,
        )

    def add(self, request: Request) -> None:
        """Queue a request. Raises ValueError("field: why") for one that the engine must not run."""
        check_request(request, self.info)
        self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Drop a request whatever its state. Its blocks are free on return; no delta follows; unknown ids are ignored."""
        self.scheduler.abort(request_id)
        self._check_integrity()

    def has_work(self) -> bool:
        return self.scheduler.has_work()

    def step(self) -> list[TokenDelta]:
        """One step for everyone whose turn it is; what each sequence gained."""
        started = time.perf_counter()
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        result = self.executor.execute(plan)
        deltas = self.scheduler.commit(plan, result)
        seconds = time.perf_counter() - started
        self.policy.observe(plan, result, seconds)
        self.recorder.step(result, seconds)
        self._check_integrity()
        return deltas

    def study(self) -> bool:
        """Some milliseconds of work for the time after this, while there is no request; False when there is none to do."""
        return self.config.profile and not self.has_work() and isinstance(self.executor, Studies) and self.executor.study()

    def check(self) -> None:
        """Raises ExecutorLostError when the engine cannot go on: a rank is gone."""
        if self._watched is not None:
            self._watched.check()

    def stats(self) -> EngineStats:
        """Gauges, counters since the start, and the observations since the last call."""
        return self.recorder.take(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            blocks_used=self.pool.num_used,
            blocks_total=self.pool.num_blocks,
            uncomputed_tokens=self.scheduler.num_uncomputed_tokens,
            calibration_error=self.policy.calibration_error,
            cost_error=self.policy.cost_error,
        )

    def close(self) -> None:
        if self.costs is not None:
            self.costs.save()
        self.executor.close()

    def _check_integrity(self) -> None:
        if self.config.check_integrity:
            self.scheduler.check_integrity()
        if self.scheduler.has_work() or self.pool.is_idle():
            return
        if self.config.check_integrity:
            raise IntegrityError(f"{self.pool.num_used} blocks in use without a sequence")
        # Nobody is being served, so starting over with an empty cache hurts nobody; the log must say it happened.
        logger.error("%d blocks in use without a sequence: the block pool is reset", self.pool.num_used)
        self.pool.reset()
