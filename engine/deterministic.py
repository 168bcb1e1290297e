"""Deterministic mode: a row's bits do not depend on how many rows share its forward, nor on whether it was drafted.

Then speculation changes no bit of an answer, logprobs included, in bfloat16 too. The native CPU kernels are so by themselves. On
a GPU attention, matrix products and norms go through Triton kernels with one order of sums each; cuBLAS takes another kernel for
another number of rows. What cannot keep the promise is refused before the weights are read. A draft model may round as it likes:
what it says is judged.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from engine.config import EngineConfig
from engine.models.config import ModelConfig
from engine.models.decoder import Decoder
from engine.models.native import unavailable
from engine.models.runner import Model, PagedModel

LEAST_PART = 256  # keys
TREE = 1024  # keys of one step's own rows beyond the longest context


def check(config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError, fit for the command line, when this model cannot be run so here."""
    if config.load_format == "transformers" or model.unsupported is not None:
        raise ValueError("deterministic: only the native decoder can do it, and this model runs through transformers' own code")
    if device.type == "cpu" and config.attention_backend != "triton":
        why = "cpu_kernels is torch" if config.cpu_kernels == "torch" else unavailable(model, dtype, device)
        if config.tensor_parallel_size > 1:
            why = "tensor_parallel_size is more than 1"
        if why is not None:
            raise ValueError(f"deterministic: on a CPU the native kernels can do it, and they are not used: {why}")
        return
    if config.attention_backend in ("reference", "flashinfer"):
        raise ValueError(f"deterministic: attention_backend {config.attention_backend} cannot do it, triton can")
    if find_spec("triton") is None:
        raise ValueError("deterministic: it takes Triton's kernels here, and triton is not installed")
    from kernels.tree_attention import unsupported  # imports triton, which a CPU can do without

    if (what := unsupported(model.num_heads, model.num_kv_heads, model.head_dim)) is not None:
        raise ValueError(f"deterministic: there is no attention kernel for {what}")


def fix_order(config: EngineConfig, shape: ModelConfig, model: Model | PagedModel) -> int:
    """Make a model so whose configuration was checked. Returns the keys of a part of a context; 0: that is its own affair."""
    if not isinstance(model, Decoder):
        return 0
    model.fix_order()
    return part_keys(config.max_model_len or shape.max_position_embeddings)


def part_keys(longest: int) -> int:
    """Keys of a part, so that contexts of up to `longest` tokens fit into as many parts as the attention kernel can merge."""
    from kernels.tree_attention import FIXED_MULTIPLE, MOST_PARTS  # imports triton, which a CPU can do without

    return max(LEAST_PART, -(-(longest + TREE) // (MOST_PARTS * FIXED_MULTIPLE)) * FIXED_MULTIPLE)
