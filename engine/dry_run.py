"""What would happen if a server started with these settings: everything that can be checked without reading a weight.

Shapes, plug-ins, vocabularies and the memory of each rank, on this machine or on one that is only described. Nothing is
loaded and nothing is allocated.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from engine import deterministic, registry
from engine.config import EngineConfig
from engine.datastore_header import Header
from engine.draft_runner import DraftRunner
from engine.footprint import rotary_bytes, step_bytes, weight_bytes
from engine.kv import KVCache
from engine.memory import SPARE_BYTES, GPUMemory, MemoryPlan, plan_memory
from engine.models.config import ModelConfig
from engine.models.loader import load_config
from engine.models.native import unavailable as native_unavailable
from engine.models.sharding import Sharding
from engine.verification import Verification
from engine.worker import _dtype

LIBRARY_BYTES = 600_000_000  # assumed of a GPU: what CUDA and its libraries hold for themselves


@dataclass(frozen=True, slots=True)
class DryRun:
    """`memory` and `parts`, bytes by what they are for, are the first rank's: no other rank takes more."""

    model: ModelConfig
    shards: list[Sharding]  # of every rank
    device: torch.device
    dtype: torch.dtype
    drafters: list[str]
    verifier: str
    memory: MemoryPlan
    parts: dict[str, int]
    token_bytes: int  # of KV cache, a drafter's own included
    total_bytes: int  # of a GPU, or of the machine
    sharers: int  # ranks of all engines that share it
    records: bool  # CUDA graphs, which take memory that only a GPU can tell

    @property
    def left_bytes(self) -> int:
        """Of the GPU or the machine, what nothing is planned for."""
        return self.total_bytes - self.sharers * sum(self.parts.values())


class StatedGPU(GPUMemory):
    """A GPU with so much memory, of which so much is taken, where the largest step is said to hold so much."""

    def __init__(self, total: int, taken: int, step: int) -> None:
        super().__init__(torch.device("cuda"))
        self._total, self._taken, self._step = total, taken, step

    def free_and_total(self) -> tuple[int, int]:
        return self._total - self._taken, self._total

    def peak_of(self, step: object) -> int:
        return self._step


def dry_run(config: EngineConfig, device_memory: int | None = None, engines: int = 1) -> DryRun:
    """`device_memory`: bytes of each GPU, or of the machine where the device is a CPU; None: as this machine says.
    `engines`: of a server, each with ranks of its own.

    Raises ValueError or OSError, fit for the command line, with the setting that cannot be used and why.
    """
    model = load_config(config.model)
    shards = [Sharding.of(model, rank, config.tensor_parallel_size) for rank in range(config.tensor_parallel_size)]
    here = engines * (1 if config.distributed_executor_backend == "ray" else len(shards))  # ranks on this machine
    device = _device(config, device_memory, here)
    dtype = _dtype(config.dtype, model.dtype)
    if device_memory is None:  # else it is another machine's business what is there
        _check_here(config, model, dtype, device)
    if config.datastore is not None:
        Header.read(config.datastore)
    if config.deterministic:
        deterministic.check(config, shards[0].config, dtype, device)
    draft = _draft(config, model, dtype, device)
    offers = registry.drafter_offers(config, model.vocab_size, frozenset(model.eos_token_ids), draft)
    drafters = [registry.make_drafter(name, offers) for name in config.drafters]
    verification = Verification(config, drafters)
    first, rank = (shards[0], shards[0].config) if len(shards) > 1 else (None, model)
    parts = {"weights": weight_bytes(config, config.model, model, dtype, device, first)}
    if draft is not None and config.draft_model is not None:
        parts["draft model"] = weight_bytes(config, config.draft_model, draft.shape, dtype, device)
    total = device_memory or _memory_of(device)
    own = KVCache.bytes_per_block(rank.num_layers, rank.num_kv_heads, config.block_size, rank.head_dim, dtype)
    drafts = draft.bytes_per_block if draft else 0
    memory = _plan(config, rank, dtype, device, parts, drafts, total)
    found = DryRun(
        model=model, shards=shards, device=device, dtype=dtype, drafters=[d.name for d in drafters],
        verifier=verification.default.name, memory=memory, parts=parts, token_bytes=(own + drafts) // config.block_size,
        total_bytes=total, sharers=1 if device.type == "cuda" else here,
        records=device.type == "cuda" and len(shards) == 1 and not config.enforce_eager,
    )  # fmt: skip
    if found.left_bytes < 0:
        sizes = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts.items())
        raise ValueError(
            f"kv_cache_memory_bytes: {here} x ({sizes}) do not fit into the machine's {total / 1e6:,.0f} MB; "
            f"lower it, or take a smaller model"
        )
    return found


def _check_here(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError for what was asked for by name and this machine does not have."""
    if config.attention_backend == "flashinfer" and find_spec("flashinfer") is None:
        raise ValueError("attention_backend: flashinfer is not installed")
    if config.cpu_kernels == "native" and (why := native_unavailable(model, dtype, device)) is not None:
        raise ValueError(f"cpu_kernels: the native kernels cannot run this model here: {why}")


def _plan(
    config: EngineConfig,
    rank: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    parts: dict[str, int],
    draft_bytes: int,
    total: int,
) -> MemoryPlan:
    """The server's own plan, for a device of which `parts` are taken; what else it takes is added to them."""
    weights, gpu = sum(parts.values()), None
    if device.type == "cuda":
        step = step_bytes(config, rank, dtype)
        parts |= {"angles of positions": rotary_bytes(rank, dtype), "libraries, assumed": LIBRARY_BYTES}
        gpu = StatedGPU(total, sum(parts.values()), step)
        parts |= {"a step, estimated": step, "spare": SPARE_BYTES}
    memory = plan_memory(config, rank, weights, dtype, device, draft_bytes, lambda: None, memory=gpu)
    parts["KV cache"] = memory.kv_bytes
    return memory


def _draft(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> DraftRunner | None:
    if config.draft_model is None:
        return None
    if not registry.wants_draft_model(config.drafters):
        raise ValueError(f"draft_model: {config.draft_model} is given, but none of the drafters uses it: add draft_model")
    return DraftRunner(config, model, dtype, device)


def _device(config: EngineConfig, device_memory: int | None, ranks: int) -> torch.device:
    """Raises ValueError for GPUs that are not here and of which nobody said how large they are."""
    count = torch.cuda.device_count()
    device = torch.device(config.device if config.device != "auto" else ("cuda" if count else "cpu"))
    need = (device.index or 0) + ranks
    if device.type == "cuda" and device_memory is None and need > count:
        field = "device" if ranks == 1 else "tensor_parallel_size" if config.tensor_parallel_size > 1 else "data_parallel_size"
        raise ValueError(
            f"{field}: it takes {need} GPUs and there are {count} here; to plan for another machine say what each GPU has: "
            f"--device-memory 80GiB"
        )
    return device


def _memory_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
