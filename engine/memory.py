"""How much KV cache this machine gets, and how long a sequence may therefore be. Decided once, before ready.

On a GPU it is what `--gpu-memory-utilization` allows, less what the largest step was seen to take beside weights and cache
(engine/workspace.py), less what captured graphs keep. What does not fit is refused with the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.kv import KVCache
from engine.models.config import ModelConfig

# On a CPU the pool shares memory with everything else, so it stays modest unless asked for: 11,000 tokens of a 135M
# model. The whole server then peaks at 1.2 GB without speculation and at 1.3 GB with it, after 32 streams.
CPU_KV_BYTES = 256 << 20
SPARE_BYTES = 256 << 20  # of a GPU: what allocators lose between tensors, and libraries ask for later


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of each; the last two on a GPU only."""

    weight_bytes: int
    kv_bytes: int
    num_blocks: int
    max_model_len: int  # tokens
    workspace_bytes: int = 0  # of one step
    graph_bytes: int = 0

    def __str__(self) -> str:
        step = f", a step {_mb(self.workspace_bytes)}, graphs {_mb(self.graph_bytes)}" if self.workspace_bytes else ""
        return f"weights {_mb(self.weight_bytes)}{step}, KV {_mb(self.kv_bytes)} = {self.num_blocks:,} blocks"


class GPUMemory:
    """What a GPU says about its memory, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def free_and_total(self) -> tuple[int, int]:
        """What nobody holds; this process's allocator gives back what it keeps for later."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)

    def peak_of(self, step: Callable[[], object]) -> int:
        """The most that `step` holds at once beyond what there is before it."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        torch.cuda.synchronize(self.device)
        return max(torch.cuda.max_memory_allocated(self.device) - before, 0)

    def taken_by(self, make: Callable[[], object]) -> int:
        """What is free before `make` and no more after it, whoever holds it."""
        before, _ = self.free_and_total()
        make()
        torch.cuda.synchronize(self.device)
        return max(before - self.free_and_total()[0], 0)


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    weight_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    draft_bytes_per_block: int = 0,
    largest_step: Callable[[], object] | None = None,
    graph_bytes: int | Callable[[GPUMemory], int] = 0,
    memory: GPUMemory | None = None,
) -> MemoryPlan:
    """`weight_bytes` of all models, for the record; a block costs its share of a drafter's own KV too.

    On a GPU `largest_step` is run to see what it takes; its own small cache may be counted. `graph_bytes`: what recorded steps
    keep, or how to find out. Raises ValueError, with the numbers, when not even one block fits or --max-model-len cannot be kept.
    """
    per_block = KVCache.bytes_per_block(model.num_layers, model.num_kv_heads, config.block_size, model.head_dim, dtype)
    per_block += draft_bytes_per_block
    workspace = 0
    if device.type == "cuda":
        memory = memory or GPUMemory(device)
        if callable(graph_bytes):
            with out_of_memory(device, "the captured graphs (--enforce-eager does without)", memory):
                graph_bytes = graph_bytes(memory)
        if largest_step is not None:
            with out_of_memory(device, "the largest step (max_num_batched_tokens)", memory):
                workspace = memory.peak_of(largest_step)
        budget = _gpu_budget(config, memory, weight_bytes, workspace + SPARE_BYTES, graph_bytes, per_block)
    else:
        budget, graph_bytes = config.kv_cache_memory_bytes or CPU_KV_BYTES, 0
    # More than every sequence at full length could use is waste.
    limit = config.max_model_len or model.max_position_embeddings
    useful = config.max_num_seqs * -(-limit // config.block_size)
    num_blocks = min(budget // per_block, useful)
    if num_blocks < 1:
        raise ValueError(f"kv_cache_memory_bytes: {budget} bytes hold no KV block of {per_block} (weights: {weight_bytes})")
    capacity = num_blocks * config.block_size
    if config.max_model_len is not None:
        own = model.max_position_embeddings
        if config.max_model_len > own:
            raise ValueError(f"max_model_len: {config.max_model_len} is more than the model's own limit of {own} tokens")
        if config.max_model_len > capacity:
            need = -(-config.max_model_len // config.block_size) * per_block
            raise ValueError(
                f"max_model_len: {config.max_model_len} tokens need {need} bytes of KV cache, but there are {budget}; "
                f"raise kv_cache_memory_bytes or lower max_model_len"
            )
    return MemoryPlan(weight_bytes, num_blocks * per_block, num_blocks, min(limit, capacity), workspace, graph_bytes)


def _gpu_budget(
    config: EngineConfig, memory: GPUMemory, weight_bytes: int, workspace: int, graph_bytes: int, per_block: int
) -> int:
    """Bytes for the cache. Raises ValueError when no block fits, or not as much as was asked for."""
    free, total = memory.free_and_total()
    share = config.gpu_memory_utilization
    rest = free - workspace - graph_bytes
    asked = config.kv_cache_memory_bytes
    budget = asked if asked is not None else int(rest - (1 - share) * total)
    if per_block <= budget <= rest:
        return budget
    others = max(total - free - weight_bytes, 0)
    numbers = (
        f"{_mb(total)} in all, weights {_mb(weight_bytes)}, a step {_mb(workspace)}, graphs {_mb(graph_bytes)}, "
        f"others and libraries {_mb(others)}; one block takes {_mb(per_block)}"
    )
    if asked is not None:
        raise ValueError(f"kv_cache_memory_bytes: {_mb(asked)} of KV cache are not to be had on this GPU: {numbers}")
    raise ValueError(
        f"gpu_memory_utilization: a share of {share:g} leaves {_mb(budget)} for the KV cache: {numbers}; "
        f"raise the share, lower max_num_batched_tokens, or take a smaller model"
    )


@contextmanager
def out_of_memory(device: torch.device, what: str, memory: GPUMemory | None = None) -> Iterator[None]:
    """A GPU's running out of memory while `what` is made becomes a ValueError with the numbers, fit for the command line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = (memory or GPUMemory(device)).free_and_total()
        reason = str(error).split(". ")[0]
        raise ValueError(f"device: {what} do not fit into {device}: {_mb(free)} of {_mb(total)} are free ({reason})") from error


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if abs(size) < 10e6 else f"{size / 1e6:,.0f} MB"
