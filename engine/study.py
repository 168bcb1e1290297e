"""Reading the target's bigrams (engine/successors.py) out of the model: what a rank does while nobody is being served.

One call feeds one small tree: its root is the first token of a text, its nodes are tokens of the vocabulary, side by side. It
lies in the block that belongs to nobody, so no sequence and no cached prefix is touched.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine import broadcast
from engine.models.batch import ForwardBatch
from engine.models.config import ModelConfig
from engine.models.runner import ModelRunner
from engine.parallel import ALONE, Group
from engine.peaks import top
from engine.plan import Row
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.successors import TOP, Successors
from engine.tree import DraftForest

SAMPLE = 64  # tokens on which the first tokens are compared
STRIDE = 7919  # between one of them and the next: all over the vocabulary
LEAST_BLOCK = 4


class Study:
    """`step` reads some more; it is done when the table is complete."""

    def __init__(self, runner: ModelRunner, shape: ModelConfig, successors: Successors, group: Group = ALONE) -> None:
        self.runner, self.shape, self.successors, self.group = runner, shape, successors, group
        self.block_size = runner.kv.block_size
        self._candidates = list(dict.fromkeys(t for t in (shape.bos_token_id, *shape.eos_token_ids, 0) if t is not None))
        self._told: dict[int, float] = {}

    def step(self) -> bool:
        """Some milliseconds of it; False when there is nothing left to do."""
        if self.successors.complete or self.block_size < LEAST_BLOCK:
            return False
        if len(self._told) < len(self._candidates):
            first = self._candidates[len(self._told)]
            self._told[first] = self._information(first)
            return True
        first = max(self._told, key=self._told.__getitem__)
        logits = self._logits(first, self.successors.unknown(self.block_size - 1))
        self.successors.learn(top(logits, TOP)[0][1:].cpu().numpy().astype(np.int32))
        return True

    def _information(self, first: int) -> float:
        """How much a token tells about the next one behind this first token, in nats: H(next) - H(next | token).

        Not every model has a token that begins a text, and what is called one may begin a chat's role: behind that all tokens
        look alike.
        """
        vocab = self.shape.vocab_size
        tokens = list(dict.fromkeys(i * STRIDE % vocab for i in range(1, SAMPLE + 1)))
        each = self.block_size - 1
        laws = [self._logits(first, tokens[i : i + each])[1:].float().softmax(-1) for i in range(0, len(tokens), each)]
        law = torch.cat(laws)
        return float(_entropy(law.mean(0, keepdim=True)).mean() - _entropy(law).mean())

    def _logits(self, first: int, tokens: list[int]) -> Tensor:
        broadcast.tell(self.group, broadcast.Study(first, tokens))
        return logits_behind(self.runner, first, tokens)


def logits_behind(runner: ModelRunner, first: int, tokens: list[int]) -> Tensor:
    """Logits [1 + tokens, V] of the first token and of each token behind it."""
    seq = Sequence(-1, Request(request_id="study", prompt_ids=[first], params=SamplingParams(max_tokens=1)), 0, frozenset())
    seq.block_ids = [runner.kv.num_blocks]
    forest = DraftForest.from_parents([([first, *tokens], [-1, *[0] * len(tokens)])])
    row, scratch = Row(-1, 0, 1, len(tokens), [], False), runner.scratch_slot
    batch = ForwardBatch.build([seq], [row], forest, [0], runner.kv.block_size, runner.device, scratch)
    return runner.node_logits(runner.forward(batch)[0], batch)


def _entropy(law: Tensor) -> Tensor:
    """[N, V] -> [N], nats."""
    return torch.special.entr(law).sum(-1)
