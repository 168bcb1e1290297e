"""The KV cache's memory on one rank. Which block belongs to whom is the scheduler's business (engine/blocks.py)."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from importlib.util import find_spec

import torch

from engine.sequence import Sequence
from engine.tree import DraftForest, Verdict
from kernels import reference

Move = Callable[[torch.Tensor, list[tuple[int, int]]], None]  # the whole cache; slots (from, to), one after the other


class KVCache:
    """kv [layers, blocks + 1, 2, kv heads, block size, head size]; see kernels/reference.py for why this layout."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        # Zeroed, not empty: masked keys of a half-filled block are multiplied by a zero weight, and 0 * NaN is NaN.
        # One block more than are handed out: padding rows of a step are stored there.
        self.scratch_slot = num_blocks * block_size
        shape = (num_layers, num_blocks + 1, 2, num_kv_heads, block_size, head_dim)
        self.kv = _zero_pages(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)
        self.layers = list(self.kv.unbind(0))
        self._commit_kv = _commit_kv(device)
        self.native: Move | None = None  # of a model with kernels of its own: torch takes 0.1 ms for 360 rows of 128 bytes

    @staticmethod
    def bytes_per_block(num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
        return num_layers * 2 * num_kv_heads * block_size * head_dim * dtype.itemsize

    def slot(self, seq: Sequence, position: int) -> int:
        return seq.block_ids[position // self.block_size] * self.block_size + position % self.block_size

    def commit(self, seqs: list[Sequence], roots: list[int], forest: DraftForest, verdict: Verdict) -> None:
        """Pack the accepted path of each tree behind its root. `roots` [trees]: the root's position in its sequence.

        A chain is in place already; only a branched tree's path has to move. Rejected nodes are undone by not advancing.
        """
        source: list[int] = []
        target: list[int] = []
        for seq, root, nodes in zip(seqs, roots, verdict.nodes, strict=True):
            for depth, node in enumerate(nodes, start=1):
                if node != depth:
                    source.append(self.slot(seq, root + node))
                    target.append(self.slot(seq, root + depth))
        if source and self.native is not None:
            # A path's nodes lie in order, each no nearer than its place, so none is overwritten before it is read.
            self.native(self.kv, list(zip(source, target, strict=True)))
        elif source:
            self.move(source, target)

    def move(self, source: list[int], target: list[int]) -> None:
        """Copy slots (block * block size + offset) in every layer; all are read before any is written."""
        index = torch.tensor([source, target], device=self.kv.device)
        self._commit_kv(self.kv, index[0], index[1])

    def warm_up(self, most_moves: int) -> None:
        """Compile what moves up to so many slots; nothing is compiled later. Nobody may hold a block yet."""
        for bits in range(max(most_moves, 1).bit_length() + 1):
            self.move([0] * (1 << bits), [0] * (1 << bits))

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks whose contents are not finite, so that their next owner's masked keys are harmless."""
        self.kv[:, blocks] = 0

    def clear_slots(self, slots: list[int]) -> None:
        """Zero slots (block * block size + offset) in every layer."""
        index = torch.tensor(slots, device=self.kv.device)
        self.kv[:, index // self.block_size, :, :, index % self.block_size] = 0


def _commit_kv(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    if device.type != "cuda" or find_spec("triton") is None:
        return reference.commit_kv
    from kernels.commit_kv import commit_kv  # imports triton, which a CPU can do without

    return commit_kv


def _zero_pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that cost no memory until they are written: torch.zeros touches every page (512 MB: 0.4 s and all of it resident)."""
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=dtype).view(shape)
