"""What the speed of this process rests on, in words: for the key of a cost table. It measures nothing."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy
import torch


def describe(device: torch.device) -> dict[str, str]:
    """Device, threads and library versions."""
    return {
        "device": _gpu(device) if device.type == "cuda" else _cpu(),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "numpy": str(numpy.__version__),
        "python": platform.python_version(),
    }


def _gpu(device: torch.device) -> str:
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory >> 20} MiB, {found.multi_processor_count} multiprocessors"


def _cpu(info: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name and what torch makes of it; the architecture alone where the system does not say."""
    names = []
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
