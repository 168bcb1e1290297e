"""The memory plan of a GPU, on numbers that are made up; and the largest step, on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.kv import KVCache
from engine.memory import SPARE_BYTES, GPUMemory, MemoryPlan, out_of_memory, plan_memory
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.loader import iter_weights, load_config
from engine.workspace import largest_batch, run_largest
from tests.engine.real import load_worker

GB = 10**9
CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
SHAPE = ModelConfig(
    architecture="llama", vocab_size=1000, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32, num_kv_heads=8,
    head_dim=128, max_position_embeddings=131072,
)  # fmt: skip
PER_BLOCK = KVCache.bytes_per_block(32, 8, 16, 128, BF16)


class Told(GPUMemory):
    """A GPU with so much memory, on which every step takes so much."""

    def __init__(self, free: int, total: int, peak: int = 0) -> None:
        super().__init__(GPU)
        self.free, self.total, self.peak = free, total, peak

    def free_and_total(self) -> tuple[int, int]:
        return self.free, self.total

    def peak_of(self, step: Callable[[], object]) -> int:
        step()
        return self.peak


def plan(
    memory: GPUMemory, graph_bytes: int = 0, step: Callable[[], object] | None = lambda: None, **options: object
) -> MemoryPlan:
    config = EngineConfig(model="m", **options)  # type: ignore[arg-type]
    return plan_memory(config, SHAPE, 16 * GB, BF16, GPU, largest_step=step, graph_bytes=graph_bytes, memory=memory)


def test_the_cache_gets_what_the_share_leaves_of_what_is_free() -> None:
    found = plan(Told(free=120 * GB, total=140 * GB, peak=2 * GB), graph_bytes=GB, gpu_memory_utilization=0.9)
    budget = 120 * GB - 14 * GB - 2 * GB - SPARE_BYTES - GB
    assert found.num_blocks == budget // PER_BLOCK and found.kv_bytes <= budget < found.kv_bytes + PER_BLOCK
    assert (found.workspace_bytes, found.graph_bytes, found.max_model_len) == (2 * GB, GB, 131072)
    assert str(found).startswith("weights 16,000 MB, a step 2,000 MB, graphs 1,000 MB, KV 102,")


def test_what_graphs_keep_may_be_found_out_first() -> None:
    told: list[GPUMemory] = []
    gpu = Told(free=120 * GB, total=140 * GB, peak=2 * GB)
    config = EngineConfig(model="m")

    def found_out(memory: GPUMemory) -> int:
        told.append(memory)
        return 3 * GB

    found = plan_memory(config, SHAPE, 16 * GB, BF16, GPU, graph_bytes=found_out, memory=gpu)
    assert told == [gpu] and found == plan_memory(config, SHAPE, 16 * GB, BF16, GPU, graph_bytes=3 * GB, memory=gpu)

    def too_many(memory: GPUMemory) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(ValueError, match=r"^device: the captured graphs \(--enforce-eager does without\) do not fit into cuda"):
        plan_memory(config, SHAPE, 16 * GB, BF16, GPU, graph_bytes=too_many, memory=gpu)
    assert plan_memory(config, SHAPE, 16 * GB, BF16, CPU, graph_bytes=too_many).graph_bytes == 0


def test_more_than_all_sequences_could_use_is_not_taken() -> None:
    found = plan(Told(free=120 * GB, total=140 * GB), max_num_seqs=2, max_model_len=4096)
    assert (found.num_blocks, found.max_model_len) == (2 * 4096 // 16, 4096)


def test_what_does_not_fit_is_said_with_the_numbers() -> None:
    small = Told(free=4 * GB, total=24 * GB, peak=3 * GB)
    with pytest.raises(ValueError, match=r"^gpu_memory_utilization: a share of 0.9 leaves -1,668 MB") as error:
        plan(small, graph_bytes=0)
    for part in ("24,000 MB in all", "weights 16,000 MB", "a step 3,268 MB", "graphs 0.0 MB", "libraries 4,000 MB", "2.1 MB"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"^kv_cache_memory_bytes: 2,000 MB of KV cache are not to be had"):
        plan(small, kv_cache_memory_bytes=2 * GB)
    assert plan(small, kv_cache_memory_bytes=GB // 2).num_blocks == GB // 2 // PER_BLOCK  # beyond the share, as it was asked for


def test_running_out_of_memory_is_said_with_the_numbers() -> None:
    def too_much() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    with pytest.raises(ValueError, match=r"^device: the largest step .* 4,000 MB of 24,000 MB are free .CUDA out of memory.$"):
        plan(Told(free=4 * GB, total=24 * GB), step=too_much)
    with (
        pytest.raises(ValueError, match=r"^device: the weights do not fit into cuda"),
        out_of_memory(GPU, "the weights", Told(1, 2)),
    ):
        too_much()


def test_a_cpu_is_planned_as_ever() -> None:
    found = plan_memory(EngineConfig(model="m"), SHAPE, 16 * GB, BF16, CPU, largest_step=lambda: pytest.fail("it was run"))
    assert found.num_blocks == (256 << 20) // PER_BLOCK and found.workspace_bytes == 0
    assert "a step" not in str(found)


@pytest.mark.parametrize(
    ("limits", "rows", "judged"),
    [
        ({}, [8] * 64, 512),
        ({"max_num_seqs": 3, "max_num_batched_tokens": 50, "max_budget": 8}, [17, 17, 16], 27),
        ({"max_num_seqs": 9, "max_num_batched_tokens": 4}, [1] * 4, 4),
        ({"max_num_seqs": 1, "max_model_len": 100}, [100], 33),
    ],
)
def test_the_largest_step_is_as_large_as_the_limits(limits: dict[str, int], rows: list[int], judged: int) -> None:
    config = EngineConfig(model="m", **limits)  # type: ignore[arg-type]
    batch = largest_batch(config, SHAPE, CPU)
    assert batch.num_rows == rows and len(batch.node_rows) == judged
    longest = config.max_model_len or SHAPE.max_position_embeddings
    for first, count, context, table in zip(batch.first_rows, rows, batch.context_lens, batch.block_tables, strict=True):
        assert longest - config.block_size < context + count <= longest
        assert len(table) == -(-(context + count) // config.block_size)
        slots = batch.slots[first : first + count].tolist()
        assert slots == [table[p // 16] * 16 + p % 16 for p in range(context, context + count)]
    assert len(set(batch.slots.tolist())) == sum(rows)  # nobody writes where another one does


def test_it_runs(tiny_llama_dir: Path) -> None:
    shape = load_config(str(tiny_llama_dir))
    config = EngineConfig(model=str(tiny_llama_dir), max_num_seqs=3, max_num_batched_tokens=20)
    model = Decoder(shape, iter_weights(str(tiny_llama_dir), shape), torch.float32, CPU)
    assert run_largest(config, model, shape, torch.float32, CPU) == (20, shape.vocab_size)


@pytest.mark.gpu
def test_a_gpu_is_measured(smollm2_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "outrider.engine"):
        worker = load_worker(smollm2_dir, "bfloat16", max_num_batched_tokens=1024, max_model_len=4096)
    rows = 1024 * worker.info.vocab_size
    assert rows * 8 < worker.memory.workspace_bytes < rows * 40
    assert "memory: weights" in caplog.text and "a step" in caplog.text
