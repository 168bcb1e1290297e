"""How much KV cache this machine gets, and how long a sequence may therefore be. Decided once, before ready."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import EngineConfig
from engine.kv import KVCache
from engine.models.config import ModelConfig

# On a CPU the pool shares memory with everything else, so it stays modest unless asked for: 11,000 tokens of a 135M
# model. The whole server then peaks at 1.2 GB without speculation and at 1.3 GB with it, after 32 streams.
CPU_KV_BYTES = 256 << 20
GPU_WORKSPACE_BYTES = 1 << 30  # activations and logits of one step


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    weight_bytes: int
    kv_bytes: int
    num_blocks: int
    max_model_len: int  # tokens


def plan_memory(
    config: EngineConfig,
    model: ModelConfig,
    weight_bytes: int,
    dtype: torch.dtype,
    device: torch.device,
    draft_bytes_per_block: int = 0,
) -> MemoryPlan:
    """`weight_bytes` of all models, for the record; a block costs its share of a drafter's own KV too.

    Raises ValueError, with the numbers, when not even one block fits or --max-model-len cannot be kept.
    """
    per_block = KVCache.bytes_per_block(model.num_layers, model.num_kv_heads, config.block_size, model.head_dim, dtype)
    per_block += draft_bytes_per_block
    budget = _kv_budget(config, device)
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
    return MemoryPlan(weight_bytes, num_blocks * per_block, num_blocks, min(limit, capacity))


def _kv_budget(config: EngineConfig, device: torch.device) -> int:
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type != "cuda":
        return CPU_KV_BYTES
    free, total = torch.cuda.mem_get_info(device)
    return int(free - (1 - config.gpu_memory_utilization) * total) - GPU_WORKSPACE_BYTES
