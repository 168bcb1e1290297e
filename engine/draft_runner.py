"""A second, smaller model beside the target: the same block ids, a KV tensor of its own. What a model drafter is handed.

It knows no sequences and decides nothing: which tokens lie where, and how far they are right, is the drafter's business
(engine/drafters/draft_model.py, engine/kv_ledger.py).
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.choose import make_attention
from engine.config import EngineConfig
from engine.kv import KVCache
from engine.models.batch import ForwardBatch
from engine.models.config import ModelConfig
from engine.models.factory import load_model
from engine.models.loader import load_config
from engine.models.runner import Model, ModelRunner, PagedModel
from engine.plan import Row
from engine.request import Request, SamplingParams
from engine.sequence import Sequence
from engine.tree import DraftForest
from engine.vocabulary import check_same_vocabulary


def make_runner(
    model: Model | PagedModel,
    shape: ModelConfig,
    num_blocks: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "auto",
    fixed_split: int = 0,
) -> ModelRunner:
    """A model with its KV cache and attention backend (`attention`, `fixed_split`: engine/attention/choose.py)."""
    kv = KVCache(shape.num_layers, num_blocks, shape.num_kv_heads, block_size, shape.head_dim, dtype, device)
    heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim)
    backend = make_attention(attention, device, *heads, block_size, dtype, shape.sliding_window, fixed_split)
    return ModelRunner(model, kv, backend)


class DraftRunner:
    """The draft model of `config.draft_model`. `load` makes `model`, `open` makes `runner`, and then it can run.

    Raises ValueError or OSError, fit for the command line, when the model cannot be read or has another vocabulary.
    """

    def __init__(self, config: EngineConfig, target: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        path = config.draft_model
        if path is None:
            raise ValueError("draft_model: none given")
        self.shape = load_config(path)
        check_same_vocabulary(config.model, target.vocab_size, path, self.shape.vocab_size)
        self.vocab_size = target.vocab_size  # of the logits that `forward` gives
        self.max_len = self.shape.max_position_embeddings  # tokens
        self.block_size = config.block_size
        self.weight_bytes = 0
        self._config = msgspec.structs.replace(config, model=path)
        self._dtype, self._device = dtype, device

    @property
    def bytes_per_block(self) -> int:
        shape = self.shape
        return KVCache.bytes_per_block(shape.num_layers, shape.num_kv_heads, self.block_size, shape.head_dim, self._dtype)

    def load(self) -> None:
        """Read the weights."""
        self.model = load_model(self._config, self.shape, self._dtype, self._device)
        self.weight_bytes = self.model.weight_bytes

    def open(self, num_blocks: int) -> None:
        """Allocate the KV of as many blocks as the target has."""
        self.runner = make_runner(self.model, self.shape, num_blocks, self.block_size, self._dtype, self._device)

    def forward(self, seqs: Seq[Sequence], rows: Seq[Row], forest: DraftForest, trees: Seq[int]) -> Tensor:
        """Feed rows and forest as the target's step does (ForwardBatch.build); float32 logits [nodes of the forest, V]."""
        runner = self.runner
        batch = ForwardBatch.build(seqs, rows, forest, trees, self.block_size, self._device, runner.scratch_slot)
        hidden, _ = runner.forward(batch)
        logits = runner.node_logits(hidden, batch).float()
        missing = self.vocab_size - logits.shape[1]
        if missing > 0:  # rows that only the target's matrix is padded with
            return F.pad(logits, (0, missing), value=float("-inf"))
        return logits if missing == 0 else logits[:, : self.vocab_size]

    def time_depth(self, repeats: int = 3) -> float:
        """Seconds of a forward of one row, the quickest of a few. Nobody may hold a block yet: it writes into the first."""
        seq = Sequence(0, Request(request_id="timing", prompt_ids=[0], params=SamplingParams(max_tokens=1)))
        seq.block_ids = [0]
        found = []
        for _ in range(1 + repeats):
            started = time.perf_counter()
            self.forward([seq], [Row(0, 0, 1, 0, [], False)], DraftForest.roots([0]), [0]).argmax().item()
            found.append(time.perf_counter() - started)
        return min(found[1:])  # the first one warms up

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy the KV of slots (block * block size + offset); all are read before any is written."""
        self.runner.kv.move(source, target)

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks that hold what is not finite."""
        self.runner.kv.clear(blocks)
