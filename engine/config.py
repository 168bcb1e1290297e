"""What an engine process is told at start. A plain leaf: the front end builds it from flags, the engine never parses any."""

from __future__ import annotations

from typing import Literal

import msgspec

DType = Literal["auto", "bfloat16", "float16", "float32"]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: str  # local directory (config.json + safetensors) or .gguf file; hub ids are resolved before this
    dtype: DType = "auto"
    device: str = "auto"  # auto | cpu | cuda | cuda:N
    max_model_len: int | None = None  # None: the model's own limit, cut to what the KV pool can hold
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16  # tokens
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None  # None: by --gpu-memory-utilization on a GPU, a share of RAM on a CPU
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1  # ranks that share the model, each a process
    distributed_executor_backend: Literal["mp", "ray"] = "mp"  # ranks: processes of this machine, or actors of a Ray cluster
    rank_timeout: float = 30.0  # seconds that one rank may keep the others waiting until the engine is restarted
    drafters: list[str] = msgspec.field(default_factory=lambda: ["prediction", "suffix", "token_recycling"])
    verifier: str = "match"
    policy: str = "goodput"  # goodput | fixed | off
    budget: int = 8  # draft nodes per sequence and step under `fixed`
    max_budget: int = 32  # most draft nodes per sequence and step under `goodput`
    max_itl_ms: float | None = None  # a step is not planned to take longer than this, as long as speculation is what costs
    profile: bool = True  # measure the cost tables at start where none are kept on disk, and read the target's bigrams when idle
    cache_dir: str | None = None  # where cost tables and compiled kernels are kept; None: ~/.cache/outrider
    draft_model: str | None = None  # drafter `draft_model`: directory or .gguf file with the target's vocabulary
    datastore: str | None = None  # drafter `rest`: file built by `outrider datastore build`
    lossy: bool = False  # allow verifiers that are not lossless
    drafter_memory_bytes: int = 64 << 20  # most memory of each kind of shared drafter state
    num_threads: int | None = None  # None: all cores this process may use
    cpu_kernels: Literal["auto", "native", "torch"] = "auto"  # of bfloat16 models on a CPU; native: refuse to start without
    cpu_weights: Literal["auto", "bfloat16"] = "auto"  # on native kernels, of four and eight bits: as they are, or unpacked
    attention_backend: Literal["auto", "triton", "flashinfer", "reference"] = "auto"  # of models that bring none of their own
    enforce_eager: bool = False  # record no steps (engine/graphs.py), which is done on a GPU
    deterministic: bool = False  # no bit of an answer depends on company or drafts (engine/deterministic.py)
    load_format: Literal["auto", "native", "transformers"] = "auto"  # transformers: force the fallback models
    check_integrity: bool = False  # verify the block pool after every step (tests)


class ProcessConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the supervisor writes to the standard input of a new engine process, as MessagePack."""

    engine: EngineConfig
    inbox: str  # ipc:// endpoint the engine reads ToEngine from
    outbox: str  # ipc:// endpoint the engine writes FromEngine to
    parent: int  # process id of the supervisor
    log_level: Literal["debug", "info", "warning", "error"] = "info"
