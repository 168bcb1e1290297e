"""The largest step that a scheduler may plan, run for the memory that it takes: before there is a KV cache, and before requests.

Every sequence stands at the end of the longest context, and as many rows as can be judged are. The cache behind it is a small
one: contexts are read out of one block over and over, which takes as long and as much beside the cache as real ones.
"""

from __future__ import annotations

import numpy as np
import torch

from engine.config import EngineConfig
from engine.draft_runner import make_runner
from engine.models.batch import ForwardBatch
from engine.models.config import ModelConfig
from engine.models.runner import Model, PagedModel


def largest_batch(config: EngineConfig, shape: ModelConfig, device: torch.device) -> ForwardBatch:
    """`max_num_batched_tokens` rows, shared out among as many sequences as may run. Block 0 is everybody's context."""
    most, size = config.max_num_batched_tokens, config.block_size
    limit = min(config.max_model_len or shape.max_position_embeddings, shape.max_position_embeddings)
    sequences = min(config.max_num_seqs, most)
    num_rows = [min(most // sequences + (b < most % sequences), limit) for b in range(sequences)]
    context_lens = [(limit - rows) // size * size for rows in num_rows]
    tables: list[list[int]] = []
    positions: list[int] = []
    slots: list[int] = []
    block = 1
    for rows, context in zip(num_rows, context_lens, strict=True):
        own = list(range(block, block + -(-rows // size)))
        tables.append([0] * (context // size) + own)
        positions += range(context, context + rows)
        slots += range(block * size, block * size + rows)
        block += len(own)
    judged = min(sum(num_rows), sequences * (1 + max(config.budget, config.max_budget)))
    index = np.array([[0] * len(slots), positions, slots], dtype=np.int64)
    token_ids, position, slot = torch.from_numpy(index).to(device).unbind(0)
    return ForwardBatch(
        index=index,
        token_ids=token_ids,
        positions=position,
        slots=slot,
        node_rows=torch.arange(judged, device=device),
        num_rows=num_rows,
        context_lens=context_lens,
        block_tables=tables,
        ancestors=[None] * sequences,
        first_rows=[0, *np.cumsum(num_rows)[:-1].tolist()],
    )


@torch.inference_mode()
def run_largest(
    config: EngineConfig,
    model: Model | PagedModel,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    fixed_split: int = 0,
) -> tuple[int, ...]:
    """Forward, logits, and two more of their size: the target law's scores, and what the rules keep. Returns their shape."""
    batch = largest_batch(config, shape, device)
    blocks = 1 + max(max(table) for table in batch.block_tables)
    runner = make_runner(model, shape, blocks, config.block_size, dtype, device, config.attention_backend, fixed_split)
    hidden, _ = runner.forward(batch)
    logits = runner.node_logits(hidden, batch)
    scores = logits.float().clone()
    return tuple(torch.empty_like(scores).shape)
