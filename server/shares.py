"""What each of several engines on this machine gets of it: its threads and its GPUs. Memory for KV each plans for itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import msgspec

from engine.config import EngineConfig

GPU_LIST = "CUDA_VISIBLE_DEVICES"
DEVICES = Path("/dev")


class Share(NamedTuple):
    config: EngineConfig
    environment: dict[str, str]  # beside the server's own


def shares(config: EngineConfig, count: int) -> list[Share]:
    """One for each engine; a single one gets everything. Raises ValueError when there are GPUs, but not enough of them."""
    if count == 1:
        return [Share(config, {})]
    if config.num_threads is None and "OMP_NUM_THREADS" not in os.environ:  # else it was decided by somebody who knows more
        cores = len(os.sched_getaffinity(0))
        config = msgspec.structs.replace(config, num_threads=max(cores // count, 1))
    return [Share(config, environment) for environment in _gpus(config, count)]


def _gpus(config: EngineConfig, count: int) -> list[dict[str, str]]:
    """An engine sees its own GPUs only, numbered from 0, so that the same configuration fits all."""
    visible, each = visible_gpus(), config.tensor_parallel_size
    here = config.distributed_executor_backend != "ray"  # which places ranks where it finds GPUs
    if not here or config.device == "cpu" or (config.device == "auto" and not visible):
        return [{}] * count
    if len(visible) < count * each:
        raise ValueError(
            f"--data-parallel-size: {count} engines need {count * each} GPUs, and there are {len(visible)} "
            f"({GPU_LIST} can name others); with --device cpu engines share the cores"
        )
    return [{GPU_LIST: ",".join(visible[i * each : (i + 1) * each])} for i in range(count)]


def visible_gpus() -> list[str]:
    """Names as CUDA takes them, without asking CUDA, which this process does not load."""
    listed = os.environ.get(GPU_LIST)
    if listed is None:
        nodes = [node for node in DEVICES.glob("nvidia*") if node.name.removeprefix("nvidia").isdecimal()]
        return [str(i) for i in range(len(nodes))]
    names: list[str] = []
    for name in filter(None, map(str.strip, listed.split(","))):
        if name.startswith("-"):  # CUDA reads no further
            break
        names.append(name)
    return names
