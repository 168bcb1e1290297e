"""Which part of a model each rank holds: whole groups of heads, a range of the inner features, a range of the vocabulary.

A rank's part is itself a smaller layer, so it has a `ModelConfig` of its own and everything below works with that. Query heads go
with their key-value head; where there are fewer of these than ranks, several ranks hold the same one. Parts need not be equal:
SmolLM2-135M's 9 heads over 3 key-value heads make 6 and 3 on two ranks. After attention and after the MLP the ranks' sums are
added up (Shoeybi et al., "Megatron-LM", arXiv 1909.08053).
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from engine.models.config import ModelConfig

INNER_UNIT = 32  # inner features are split at multiples of it where they divide: whole blocks of quantized weights
COLUMNS = ("self_attn.o_proj", "mlp.down_proj")  # linears whose inputs are split
WHOLE = slice(None)


@dataclass(frozen=True, slots=True)
class Sharding:
    """The part of one rank of several. Ranges are half open, in the whole model's numbers."""

    whole: ModelConfig
    rank: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    inner: tuple[int, int]
    vocab: tuple[int, int]

    @classmethod
    def of(cls, config: ModelConfig, rank: int, size: int) -> Sharding:
        """Raises ValueError("tensor_parallel_size: ...") for a model that cannot be split so."""
        check_split(config, size)
        kv_heads = _kv_heads(config, rank, size)
        group = config.num_heads // config.num_kv_heads
        heads = (kv_heads[0] * group, kv_heads[1] * group)
        if size > config.num_kv_heads:
            heads = _even(config.num_heads, rank, size)
        unit = INNER_UNIT if config.intermediate_size % INNER_UNIT == 0 and config.intermediate_size >= size * INNER_UNIT else 1
        inner = tuple(unit * end for end in _even(config.intermediate_size // unit, rank, size))
        return cls(config, rank, heads, kv_heads, (inner[0], inner[1]), _even(config.vocab_size, rank, size))

    @property
    def config(self) -> ModelConfig:
        """The shape of this part. Its vocabulary is the whole one's: logits are gathered before anybody reads them."""
        return msgspec.structs.replace(
            self.whole,
            num_heads=self.heads[1] - self.heads[0],
            num_kv_heads=self.kv_heads[1] - self.kv_heads[0],
            intermediate_size=self.inner[1] - self.inner[0],
        )

    def index(self, name: str) -> tuple[slice, ...] | None:
        """Which part of the tensor of this Hugging Face name is this rank's; None: all of it."""
        size = self.whole.head_dim
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return (slice(*self.vocab),)
        part, _, kind = name.rpartition(".")
        linear = part.split(".", 3)[-1]
        ranges = {
            "self_attn.q_proj": (self.heads[0] * size, self.heads[1] * size),
            "self_attn.k_proj": (self.kv_heads[0] * size, self.kv_heads[1] * size),
            "self_attn.v_proj": (self.kv_heads[0] * size, self.kv_heads[1] * size),
            "self_attn.o_proj": (self.heads[0] * size, self.heads[1] * size),
            "mlp.gate_proj": self.inner,
            "mlp.up_proj": self.inner,
            "mlp.down_proj": self.inner,
        }
        if linear not in ranges or (linear in COLUMNS and kind == "bias"):
            return None
        own = slice(*ranges[linear])
        return (WHOLE, own) if linear in COLUMNS else (own,)

    def cut(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of a whole tensor, in memory of its own."""
        index = self.index(name)
        return self.settle(name, tensor if index is None else tensor[index].clone(memory_format=torch.contiguous_format))

    def settle(self, name: str, part: Tensor) -> Tensor:
        """A part as it is to be used: what is added after the sum over ranks is rank 0's to add."""
        added_once = self.rank > 0 and name.endswith(tuple(f"{linear}.bias" for linear in COLUMNS))
        return torch.zeros_like(part) if added_once else part


def vocab_parts(config: ModelConfig, size: int) -> list[int]:
    """How many tokens of the vocabulary each rank holds."""
    parts = [_even(config.vocab_size, rank, size) for rank in range(size)]
    return [end - begin for begin, end in parts]


def check_split(config: ModelConfig, size: int) -> None:
    """Raises ValueError("tensor_parallel_size: ...") for a model that cannot be split over so many ranks."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if size > kv_heads and (size % kv_heads or heads % size):
        raise ValueError(
            f"tensor_parallel_size: {size} ranks cannot share {heads} attention heads over {kv_heads} key-value heads; "
            f"up to {kv_heads} ranks can, and multiples of {kv_heads} that divide {heads}"
        )
    if config.vocab_size < size or config.intermediate_size < size:
        raise ValueError(f"tensor_parallel_size: the model is too small for {size} ranks")


def _kv_heads(config: ModelConfig, rank: int, size: int) -> tuple[int, int]:
    if size <= config.num_kv_heads:
        return _even(config.num_kv_heads, rank, size)
    own = rank * config.num_kv_heads // size
    return own, own + 1


def _even(count: int, rank: int, size: int) -> tuple[int, int]:
    """Part `rank` of `size`: no part is larger than another by more than one, the larger ones come first."""
    most, more = divmod(count, size)
    begin = rank * most + min(rank, more)
    return begin, begin + most + (rank < more)
