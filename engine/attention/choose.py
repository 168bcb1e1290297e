"""Which attention backend serves a model: what was asked for, or the fastest there is for the device."""

from __future__ import annotations

import logging
from importlib.util import find_spec

import torch

from engine.attention.reference import ReferenceAttention
from engine.models.runner import AttentionBackend

logger = logging.getLogger(__name__)


def make_attention(
    name: str,
    device: torch.device,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    dtype: torch.dtype,
    window: int | None,
    fixed_split: int = 0,
) -> AttentionBackend:
    """`name`: auto, triton or reference. On a CPU `auto` is the reference; triton, asked for by name, is interpreted there.

    `fixed_split` (engine/deterministic.py) takes triton, whatever the device.

    Raises ValueError, fit for the command line, when triton was asked for and cannot serve these heads or is not installed.
    """
    shape = (num_heads, num_kv_heads, head_dim, block_size, dtype, window)
    if fixed_split:
        from engine.attention.triton import TritonAttention

        return TritonAttention(*shape, fixed_split)
    if name == "reference" or (name == "auto" and device.type != "cuda"):
        return ReferenceAttention(*shape)
    if find_spec("triton") is None:
        if name != "auto":
            raise ValueError("attention_backend: triton is not installed")
        logger.warning("Triton is not installed: attention runs on plain torch, and the model will be slower")
        return ReferenceAttention(*shape)
    from engine.attention.triton import TritonAttention  # imports triton, which a CPU can do without

    try:
        return TritonAttention(*shape)
    except ValueError as error:
        if name != "auto":
            raise
        logger.warning("attention runs on plain torch, and the model will be slower: %s", error)
        return ReferenceAttention(*shape)
