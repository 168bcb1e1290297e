"""Workers for timing: one that needs no files, and one that waits for the device after each part of a step.

A model of a known shape gets random weights, made where it runs. Its contexts are made up as well unless they are asked for:
the keys and values of a prompt are whatever numbers lie in the cache, so that 32,000 tokens need not be fed. Not for a server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import torch

from bench.shapes import SHAPES, random_weights
from engine.config import EngineConfig
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.factory import tuned
from engine.models.native import NativeDecoder, unavailable
from engine.models.runner import Model, PagedModel
from engine.plan import RowResult, StepPlan, StepResult, StepTimes
from engine.protocols import Policy
from engine.worker import Worker

STRIDE = 7919  # between the tokens that two sequences begin to answer with


class ShapedWorker(Worker):
    """`config.model` names a shape of bench.shapes. Raises KeyError for another name."""

    def __init__(self, config: EngineConfig, prefill: bool = False) -> None:
        """prefill: prompts are really fed."""
        super().__init__(config)
        self.prefill = prefill
        if not prefill:  # zeros are quicker to multiply than what a context holds
            self.kv.kv.normal_()

    def _load_config(self) -> ModelConfig:
        return SHAPES[self.config.model]

    def _load_model(self, dtype: torch.dtype) -> Model | PagedModel:
        shape, weights = self.model_config, random_weights(self.model_config, dtype, self.device)
        if self.config.cpu_kernels != "torch" and unavailable(shape, dtype, self.device) is None:
            return NativeDecoder(shape, weights, self.config.block_size)
        return tuned(Decoder(shape, weights, dtype, self.device), self.config)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> StepResult:
        if self.prefill or all(row.num_new == 1 for row in plan.rows):
            return super().step(plan)
        seqs = self.apply(plan)
        results = [
            RowResult(row.seq_id, [row.seq_id * STRIDE % self.info.vocab_size] if row.num_new == seq.num_uncomputed else [])
            for seq, row in zip(seqs, plan.rows, strict=True)
        ]
        self.advance(seqs, plan.rows, [result.token_ids for result in results])
        return StepResult(results, StepTimes(), sum(row.num_new for row in plan.rows))


class Direct:
    """An executor over a worker that somebody else made. `at_once`: tokens that a step may be planned with, if that is more."""

    def __init__(self, worker: Worker, at_once: int = 0) -> None:
        self._worker = worker
        tokens = max(worker.info.max_num_batched_tokens, at_once)
        self.info = msgspec.structs.replace(worker.info, max_num_batched_tokens=tokens)

    def guide(self, policy: Policy) -> None:
        self._worker.guide(policy)

    def execute(self, plan: StepPlan) -> StepResult:
        return self._worker.step(plan)

    def close(self) -> None:
        self._worker.close()


def wait_for_device(worker: Worker) -> None:
    """From now on forward and target law end when the device has ended them: their times are then its own."""
    if worker.device.type != "cuda":
        return
    for owner, name in ((worker.runner, "forward"), (worker.runner, "node_logits"), (worker, "target_law")):
        setattr(owner, name, _waiting(getattr(owner, name), torch.cuda.synchronize))


def _waiting(call: Callable[..., Any], wait: Callable[[], object]) -> Callable[..., Any]:
    def waited(*args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        wait()
        return result

    return waited
