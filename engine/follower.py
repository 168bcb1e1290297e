"""What every rank but the first does: rank 0's steps over its own part of the model. It decides nothing."""

from __future__ import annotations

import msgspec
import torch

from engine import broadcast
from engine.broadcast import Again, Drop, Ruling, Step, Stop, Study
from engine.config import EngineConfig
from engine.study import logits_behind
from engine.worker import Worker, judged_rows


def follower_config(config: EngineConfig) -> EngineConfig:
    """A rank that neither drafts nor judges: a draft model, if there is one, lies whole on rank 0."""
    return msgspec.structs.replace(config, drafters=[], draft_model=None, datastore=None, profile=False)


class Follower:
    """Follows what rank 0 of its worker's group tells. The worker was made with `follower_config`."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    @torch.inference_mode()
    def follow(self) -> None:
        """Returns when rank 0 says Stop. Raises DivergedError, and GoneError when another rank is gone."""
        while True:
            told = broadcast.hear(self.worker.group)
            match told:
                case Step():
                    self._step(told)
                case Study():
                    logits_behind(self.worker.runner, told.first, told.tokens)
                case Drop():
                    self.worker.drop(told.seq_ids)
                case Stop():
                    return
                case Ruling() | Again():
                    raise broadcast.DivergedError("a verdict without a step")

    def _step(self, told: Step) -> None:
        worker, plan, forest = self.worker, told.plan, told.trees.forest()
        seqs = worker.apply(plan)
        broadcast.check(told, worker.seqs.values())
        judged, trees = judged_rows(plan, seqs)
        batch, hidden, _, _ = worker.feed(plan, seqs, forest, trees)
        while isinstance(ruling := broadcast.hear(worker.group), Again):
            forest = worker.undraft(plan, seqs, judged, forest, ruling.trees)
            batch, hidden, _, _ = worker.feed(plan, seqs, forest, trees)
        if not isinstance(ruling, Ruling):
            raise broadcast.DivergedError(f"step {plan.step} has no verdict")
        worker.settle(plan, seqs, judged, forest, ruling.verdict(), ruling.corrupted)
        for *_, rows in worker.prompt_rows(plan, seqs, batch):
            worker.runner.logits(hidden, rows)
        worker.advance(seqs, plan.rows, [ruling.tokens[tree] if tree >= 0 else [] for tree in trees])
