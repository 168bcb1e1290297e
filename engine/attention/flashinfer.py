"""Attention through FlashInfer (arXiv 2501.01005) where it is installed: planned once per step, run once per layer.

Chains and prompt chunks are causal; a step in which a tree branches brings a mask. There are two wrappers, as one that has
chosen its kernels for the first cannot do the second. FlashInfer has a packed form of masks, which it makes itself on the device,
out of one byte for each row and key: where it is handed the packed form it looks for every sequence but the first at the place of
its first bit, counted in bytes (0.2 to 0.6). What is sent is therefore only where the zeros are.

Never yet run on a GPU: the tests hand its arrays to a wrapper of their own, which computes from them what the documentation says.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.block_table import arrays, joined
from engine.models.batch import ForwardBatch
from kernels import reference

SIZES = (64, 128, 256)  # of a head
WORKSPACE = 128 << 20  # bytes, for the unmerged parts of long contexts


class FlashInferAttention:
    """`wrapper` makes what plans and runs: FlashInfer's BatchPrefillWithPagedKVCacheWrapper, or (tests) what computes as it does.

    Raises ValueError, fit for the command line, for what FlashInfer has no kernels for.
    """

    name = "flashinfer"

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        window: int | None,
        device: torch.device,
        wrapper: Callable[..., Any] | None = None,
    ) -> None:
        if wrapper is None:
            wrapper = _wrapper(head_dim, dtype, device)
        self._sizes = (num_heads, num_kv_heads, head_dim, block_size)
        self._scale = head_dim**-0.5
        self._window, self._dtype = window, dtype
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._chains = wrapper(workspace, "HND")
        self._trees = wrapper(workspace, "HND", backend="fa2")  # the others know no masks
        self._planned = self._chains
        self._write = _write_kv(device)
        self._slots, self._rows = torch.zeros(0, dtype=torch.int64), 0

    def plan(self, batch: ForwardBatch) -> None:
        """Which pages belong to whom, and who sees what."""
        self._slots, self._rows = batch.slots, batch.num_tokens
        kinds = {"sm_scale": self._scale, "q_data_type": self._dtype, "kv_data_type": self._dtype}
        where = [torch.from_numpy(part) for part in pages(batch, self._sizes[3])]
        if all(tree is None for tree in batch.ancestors):
            self._planned = self._chains
            window = -1 if self._window is None else self._window - 1
            self._planned.plan(*where, *self._sizes, causal=True, window_left=window, **kinds)
            return
        self._planned = self._trees
        lens = np.array(batch.context_lens) + np.array(batch.num_rows)
        mask = torch.ones(int(lens @ np.array(batch.num_rows)), dtype=torch.bool, device=batch.slots.device)
        mask.index_fill_(0, torch.from_numpy(hidden(batch, self._window)).to(mask.device), False)
        # Its packing takes where sequences begin from the device, and its plan then waits for them to come back.
        self._planned.plan(*(part.to(mask.device) for part in where), *self._sizes, custom_mask=mask, **kinds)

    def run(self, kv: Tensor, q: Tensor, new: Tensor | None, scale: float) -> Tensor:
        """Store the fed rows' keys and values in one layer's kv, then attend. q [T, H, D], new [T, 2, K, D] -> [T, H * D]."""
        if new is not None:
            self._write(kv, new, self._slots)
        asked = q[: self._rows]
        if scale != self._scale:  # the plan has the usual one
            asked = asked * (scale / self._scale)
        out = self._planned.run(asked, kv).flatten(1)
        return out if len(q) == self._rows else F.pad(out, (0, 0, 0, len(q) - self._rows))

    def warm_up(self, kv: Tensor) -> None:
        """Compile, or load, both kinds of kernels. It reads and writes block 0 only; nobody may hold it yet."""
        heads, kv_heads, size, block_size = self._sizes
        device = kv.device
        for rows, tree in ((1, None), (3, np.array([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=bool))):
            index = np.zeros((3, rows), dtype=np.int64)
            token_ids, positions, slots = torch.from_numpy(index).to(device)
            blocks = [0] * -(-rows // block_size)
            self.plan(ForwardBatch(index, token_ids, positions, slots, slots, [rows], [0], [blocks], [tree], [0]))
            qkv = torch.zeros(rows, heads + 2 * kv_heads, size, dtype=self._dtype, device=device)
            self.run(kv, qkv[:, :heads], qkv[:, heads:].view(rows, 2, kv_heads, size), self._scale)


def pages(batch: ForwardBatch, block_size: int) -> list[NDArray[np.int32]]:
    """For FlashInfer's `plan`: qo_indptr [B + 1], paged_kv_indptr [B + 1], paged_kv_indices, paged_kv_last_page_len [B]."""
    lens = np.array(batch.context_lens) + np.array(batch.num_rows)
    counts = -(-lens // block_size)
    used = joined([ids[:count] for ids, count in zip(arrays(batch.block_tables), counts.tolist(), strict=True)])
    parts = [np.cumsum([0, *batch.num_rows]), np.cumsum([0, *counts]), used, (lens - 1) % block_size + 1]
    return [part.astype(np.int32) for part in parts]


def hidden(batch: ForwardBatch, window: int | None) -> NDArray[np.int64]:
    """Where the mask of a step is zero: sequence after sequence, each of its rows over all keys, the step's own rows the last.

    A window counts from a row's depth, not from its slot.
    """
    found, begin = [], 0
    own = batch.positions.tolist() if window is not None else []
    for first, rows, context, tree in zip(batch.first_rows, batch.num_rows, batch.context_lens, batch.ancestors, strict=True):
        length = context + rows
        unseen = ~(np.tri(rows, dtype=bool) if tree is None else tree)
        if window is not None:
            positions = np.array(own[first : first + rows])
            at = np.concatenate((np.arange(context), positions))
            unseen = np.concatenate((np.zeros((rows, context), dtype=bool), unseen), 1) | (at <= positions[:, None] - window)
        row, key = np.nonzero(unseen)
        found.append(begin + row * length + key + length - unseen.shape[1])
        begin += rows * length
    return np.concatenate(found)


def unavailable(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why it cannot be used here; None when it can."""
    if find_spec("flashinfer") is None:
        return "is not installed"
    if device.type != "cuda":
        return "runs on GPUs only"
    if head_dim not in SIZES or dtype not in (torch.float16, torch.bfloat16):
        return f"has no form for heads of {head_dim} in {str(dtype).removeprefix('torch.')}"
    return None


def _wrapper(head_dim: int, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    if (what := unavailable(head_dim, dtype, device)) is not None:
        raise ValueError(f"attention_backend: flashinfer {what}")
    import flashinfer

    return flashinfer.BatchPrefillWithPagedKVCacheWrapper


def _write_kv(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], None]:
    if device.type != "cuda" or find_spec("triton") is None:
        return reference.write_kv
    from kernels.write_kv import write_kv  # imports triton, which a CPU can do without

    return write_kv
