"""Paged tree attention through the Triton kernels: a step's tables go to the device in one copy, and every layer reads them.

On a CPU the kernels are interpreted, which is for tests and very slow. Tested against `kernels.reference.tree_attention`.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.recorded import TritonRoom
from engine.attention.trees import Int, Trees
from engine.block_table import stacked
from engine.models.batch import ForwardBatch
from engine.models.runner import Bucket
from kernels.interpreter import interpreted
from kernels.tree_attention import forms, tree_attention, unsupported
from kernels.write_kv import write_kv


@dataclass(frozen=True, slots=True)
class Plan:
    """What `tree_attention` is told of a step; shapes and words as there."""

    slots: Tensor
    positions: Tensor
    block_tables: Tensor
    cu_q: Tensor
    context_lens: Tensor
    roots: Tensor
    ancestors: Tensor | None  # None: no tree of the step branches
    paths: Tensor | None  # only with a fixed split
    max_rows: int
    max_keys: int


class TritonAttention:
    """The GPU's attention backend. `fixed_split`: keys of a context's parts, for answers whose bits do not depend on company.

    Raises ValueError for heads that the kernel has no form for.
    """

    name = "triton"

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        window: int | None,
        fixed_split: int = 0,
    ) -> None:
        if (what := unsupported(num_heads, num_kv_heads, head_dim)) is not None:
            raise ValueError(f"attention_backend: triton has no form for {what}")
        self.window, self.fixed_split = window, fixed_split
        self._heads, self._block_size, self._dtype = (num_heads, num_kv_heads, head_dim), block_size, dtype
        self._plan: Plan | None = None

    def plan(self, batch: ForwardBatch) -> None:
        """Tables of one step, shared by all layers."""
        trees, total = Trees.of(batch), len(batch.slots)
        branched = trees.num_words > 0
        with_paths = branched and self.fixed_split > 0
        words = np.zeros((total, trees.num_words), np.int32)
        paths = np.zeros((total, trees.depth if with_paths else 0), np.int32)
        if branched:
            trees.write(batch, words, paths)
        parts = [
            stacked(batch.block_tables),
            np.array([0, *np.cumsum(batch.num_rows)], np.int32),
            np.array(batch.context_lens, np.int32),
            trees.roots,
            words,
            paths,
        ]
        at = _to_device(parts, batch.slots.device)
        self._plan = Plan(
            slots=batch.slots,
            positions=batch.positions,
            block_tables=at[0],
            cu_q=at[1],
            context_lens=at[2],
            roots=at[3],
            ancestors=at[4] if branched else None,
            paths=at[5] if with_paths else None,
            max_rows=max(batch.num_rows, default=0),
            max_keys=max((c + r for c, r in zip(batch.context_lens, batch.num_rows, strict=True)), default=0),
        )

    def warm_up(self, kv: Tensor) -> None:
        """Compile every form that a step may take over this layer's kv; nothing is compiled later. It reads block 0 only."""
        (heads, kv_heads, size), device = self._heads, kv.device
        for rows, keys, splits, tree in forms(heads // kv_heads, size, self._dtype, self.fixed_split > 0):
            qkv = torch.zeros(rows, heads + 2 * kv_heads, size, dtype=self._dtype, device=device)
            words = torch.zeros(rows, -(-rows // 32), dtype=torch.int32, device=device) if tree else None
            column = torch.zeros(1, dtype=torch.int32, device=device)
            nowhere = torch.full((rows,), -1, device=device)
            with interpreted() if device.type == "cpu" else nullcontext():
                write_kv(kv, qkv[:, heads:].view(rows, 2, kv_heads, size), nowhere)
                tree_attention(
                    qkv[:, :heads],
                    kv,
                    torch.zeros(1, -(-keys // kv.shape[3]), dtype=torch.int32, device=device),
                    torch.tensor([0, rows], dtype=torch.int32, device=device),
                    column + keys - rows,
                    words,
                    1.0,
                    roots=column,
                    positions=torch.arange(keys - rows, keys, device=device),
                    window=self.window,
                    max_rows=rows,
                    max_keys=keys,
                    splits=splits,
                    fixed_split=self.fixed_split,
                    paths=words,
                )

    def room(self, most: Bucket, longest: int, device: torch.device) -> TritonRoom:
        """For steps that are recorded (engine/graphs.py)."""
        return TritonRoom(self._heads, self._block_size, self._dtype, self.window, self.fixed_split, most, longest, device)

    def run(self, kv: Tensor, q: Tensor, new: Tensor | None, scale: float) -> Tensor:
        """Store the fed rows' keys and values in one layer's kv, then attend. q [T, H, D], new [T, 2, K, D] -> [T, H * D]."""
        plan = self._plan
        assert plan is not None, "plan comes before run"
        with interpreted() if q.device.type == "cpu" else nullcontext():
            if new is not None:
                write_kv(kv, new, plan.slots)
            out = tree_attention(
                q,
                kv,
                plan.block_tables,
                plan.cu_q,
                plan.context_lens,
                plan.ancestors,
                scale,
                roots=plan.roots,
                positions=plan.positions,
                window=self.window,
                max_rows=plan.max_rows,
                max_keys=plan.max_keys,
                fixed_split=self.fixed_split,
                paths=plan.paths,
            )
        return out.flatten(1)


def _to_device(parts: list[Int], device: torch.device) -> list[Tensor]:
    """All of them in one copy."""
    flat = torch.from_numpy(np.concatenate([part.reshape(-1) for part in parts])).to(device)
    pieces = flat.split([part.size for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]
