"""Shapes of well-known models, for timing without their files: a step's time depends on sizes, not on what was learned."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.models.config import ModelConfig
from engine.models.shapes import expected_shapes

SPREAD = 0.02  # standard deviation of a random weight; products then stay finite through any number of layers


def _llama(hidden: int, inner: int, layers: int, head_dim: int, tied: bool) -> ModelConfig:
    # Plain rotary frequencies: scaled ones make a table with other numbers in it, which is read as fast.
    return ModelConfig(
        architecture="llama", vocab_size=128256, hidden_size=hidden, intermediate_size=inner, num_layers=layers, num_heads=32,
        num_kv_heads=8, head_dim=head_dim, rms_norm_eps=1e-5, rope_theta=500000.0, max_position_embeddings=131072,
        tie_word_embeddings=tied, dtype="bfloat16",
    )  # fmt: skip


SHAPES = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 64, tied=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 128, tied=False),
    "tiny": ModelConfig(
        architecture="llama", vocab_size=128, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16, max_position_embeddings=512, tie_word_embeddings=True, dtype="bfloat16",
    ),
}  # fmt: skip


def random_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) of every weight, made on the device one by one; the same ones each time. Norms are ones."""
    generator = torch.Generator(device).manual_seed(0)
    for name, shape in expected_shapes(config).items():
        if len(shape) == 1:
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=dtype, device=device)
        else:
            yield name, torch.empty(shape, dtype=dtype, device=device).normal_(0.0, SPREAD, generator=generator)
