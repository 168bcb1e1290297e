"""The largest step that a scheduler may plan, run for the memory that it takes: before there is a KV cache, and before requests.

Every sequence stands at the end of the longest context, and as many rows as can be judged are. The cache behind it is a small
one: contexts are read out of one block over and over, which takes as long and as much beside the cache as real ones.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

import numpy as np
import torch

from engine.config import EngineConfig
from engine.draft_runner import make_runner
from engine.graphs import Graphs, Recorder, make_graphs, why_not
from engine.memory import GPUMemory, MemoryPlan
from engine.models.batch import ForwardBatch
from engine.models.config import ModelConfig
from engine.models.runner import Model, ModelRunner, PagedModel
from engine.protocols import Drafter

logger = logging.getLogger("outrider.engine")

SAMPLES = 4  # recordings that tell what a further one takes


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


def graph_bytes(
    config: EngineConfig,
    models: Iterable[tuple[Model | PagedModel, ModelConfig, int]],
    dtype: torch.dtype,
    device: torch.device,
    drafters: Iterable[Drafter],
    memory: GPUMemory,
    recorder: Recorder | None = None,
) -> int:
    """What the recorded steps of an engine will keep. The largest is recorded, and a few others, over a cache of one block.

    models: the target and perhaps a draft model, their shapes and fixed splits. `recorder`: of a device that is none (tests).
    """
    layers, total = taps(drafters), 0
    for model, shape, fixed_split in models:
        total += _graph_bytes(config, model, shape, dtype, device, fixed_split, layers, memory, recorder)
        layers = ()
    return total


def _graph_bytes(
    config: EngineConfig,
    model: Model | PagedModel,
    shape: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    fixed_split: int,
    layers: tuple[int, ...],
    memory: GPUMemory,
    recorder: Recorder | None,
) -> int:
    runner = make_runner(model, shape, 1, config.block_size, dtype, device, config.attention_backend, fixed_split)
    made: list[Graphs] = []

    def record_largest() -> None:
        graphs = make_graphs(config, shape, runner, layers, recorder)
        if graphs is not None:
            made.append(graphs)
            graphs.record(graphs.buckets[:1])

    largest = memory.taken_by(record_largest)
    if not made or len(made[0].buckets) == 1:
        return largest if made else 0
    rest = made[0].buckets[1:]
    sample = rest[:: -(-len(rest) // SAMPLES)]
    return largest + -(-memory.taken_by(lambda: made[0].record(sample)) * len(rest) // len(sample))


def record_graphs(
    config: EngineConfig,
    shape: ModelConfig,
    runner: ModelRunner,
    plan: MemoryPlan,
    drafters: Iterable[Drafter],
    memory: GPUMemory | None = None,
    recorder: Recorder | None = None,
) -> None:
    """Record every step that can be, and let the runner use them. Nothing is recorded later, and nobody may be served yet."""
    graphs = make_graphs(config, shape, runner, taps(drafters), recorder)
    if graphs is None:
        if runner.device.type == "cuda":
            logger.info("graphs: no step is recorded: %s", why_not(config, runner))
        return
    started = time.perf_counter()
    taken = (memory or GPUMemory(runner.device)).taken_by(graphs.record)
    runner.graphs = graphs
    logger.info(
        "graphs: %d steps of up to %d tokens recorded in %.1f s, %.0f MB (planned: %.0f MB)",
        len(graphs.buckets), graphs.buckets[0].tokens, time.perf_counter() - started, taken / 1e6, plan.graph_bytes / 1e6,
    )  # fmt: skip


def taps(drafters: Iterable[Drafter]) -> tuple[int, ...]:
    """Layers whose hidden states some drafter wants."""
    return tuple(sorted({layer for drafter in drafters for layer in drafter.needs.hidden_layers}))
