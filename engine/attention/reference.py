"""Paged tree attention in plain torch, tuned for CPUs: planned once per step, run once per layer, batched over sequences.

Sequences with few rows (decoding, verifying) are attended together: one gather brings their contexts out of the pool,
padded to the longest, and one masked attention serves all. A long prompt chunk is attended alone. Tested against
`kernels.reference.tree_attention`, the definition.

A row's result is bit for bit the same whatever shares the step with it (torch 2.13, bf16 and float32). SDPA's CPU kernel takes
another path only for query blocks of fewer than four rows and for a last few keys, so query rows are padded to multiples of
four and keys to multiples of sixteen. A batched matmul would be faster for many sequences (95 us against 204 at 16 x 128 keys)
but rounds otherwise, so a request alone and in a batch would differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.batch import ForwardBatch
from kernels import reference

LONG_CHUNK = 48  # rows of one sequence from which it is attended alone: padding others to it would cost more
MAX_PADDING = 2.0  # a group's longest context may be this many times its shortest
QUERY_MULTIPLE = 4  # see above
KEY_MULTIPLE = 16  # likewise: a tail of fewer keys is summed in another order


@dataclass(slots=True)
class Group:
    """Sequences that are attended in one call. R rows each (padded), L keys each (padded)."""

    gather: Tensor  # [2 * B * K * W] rows of kv.view(-1, S * D): the blocks of the group's contexts
    shape: tuple[int, int, int]  # B, R, L
    mask: Tensor  # [B, 1, R * G padded, L] additive, in the model's dtype
    take: Tensor | slice  # fed rows of the group, padded: [B * R], or a slice when nothing is padded
    give: Tensor | None  # positions in the padded output [rows of the group]; None when nothing is padded


class ReferenceAttention:
    """The CPU's attention backend."""

    name = "reference"

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, window: int | None
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.block_size, self.dtype, self.window = block_size, dtype, window
        self.groups: list[Group] = []
        self.kv_rows = torch.empty(0, dtype=torch.int64)

    def plan(self, batch: ForwardBatch) -> None:
        """Index tensors and masks of one step, shared by all layers."""
        self.kv_rows = reference.kv_rows(batch.slots, self.num_kv_heads, self.block_size).view(-1)
        lengths = [context + rows for context, rows in zip(batch.context_lens, batch.num_rows, strict=True)]
        short = sorted((b for b, rows in enumerate(batch.num_rows) if rows < LONG_CHUNK), key=lengths.__getitem__)
        members = [[b] for b, rows in enumerate(batch.num_rows) if rows >= LONG_CHUNK]
        while short:
            limit = max(lengths[short[0]] * MAX_PADDING, lengths[short[0]] + 4 * self.block_size)
            group = [b for b in short if lengths[b] <= limit]
            members.append(sorted(group))
            short = short[len(group) :]
        self.groups = [self._group(batch, group, lengths) for group in members]

    def run(self, kv: Tensor, q: Tensor, new: Tensor, scale: float) -> Tensor:
        """Store the fed rows' keys and values in one layer's kv, then attend. q [T, H, D], new [T, 2, K, D] -> [T, H * D]."""
        kv.view(-1, self.head_dim).index_copy_(0, self.kv_rows, new.reshape(-1, self.head_dim))
        if len(self.groups) == 1 and self.groups[0].give is None:
            return self._attend(kv, q, self.groups[0], scale)
        out = q.new_empty(q.shape[0], self.num_heads * self.head_dim)
        for group in self.groups:
            rows = self._attend(kv, q[group.take], group, scale)
            if group.give is None:
                out[group.take] = rows
            else:
                out[group.take[group.give]] = rows[group.give]  # type: ignore[index]  # padded groups take by tensor
        return out

    def _attend(self, kv: Tensor, q: Tensor, group: Group, scale: float) -> Tensor:
        """q [B * R, H, D] of one group -> [B * R, H * D]."""
        count, rows, _ = group.shape
        heads, size = self.num_kv_heads, self.head_dim
        keys, values = kv.view(-1, self.block_size * size).index_select(0, group.gather).view(2, count, heads, -1, size)
        per_head = self.num_heads // heads
        if rows == 1:
            q = q.view(count, heads, per_head, size)
        else:
            q = q.view(count, rows, heads, per_head, size).transpose(1, 2).reshape(count, heads, rows * per_head, size)
        if padding := group.mask.shape[2] - rows * per_head:
            q = F.pad(q, (0, 0, 0, padding))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask, scale=scale)
        if padding:
            out = out[:, :, : rows * per_head]
        if rows > 1:
            out = out.reshape(count, heads, rows, per_head, size).transpose(1, 2)
        return out.reshape(count * rows, self.num_heads * size)

    def _group(self, batch: ForwardBatch, members: list[int], lengths: list[int]) -> Group:
        count, rows = len(members), max(batch.num_rows[b] for b in members)
        whole = KEY_MULTIPLE // math.gcd(KEY_MULTIPLE, self.block_size)  # blocks
        width = -(-max(lengths[b] for b in members) // (self.block_size * whole)) * whole
        length = width * self.block_size
        tables = torch.zeros(count, width, dtype=torch.int64)
        for i, b in enumerate(members):
            used = -(-lengths[b] // self.block_size)
            tables[i, :used] = torch.tensor(batch.block_tables[b][:used])
        side = torch.arange(2 * self.num_kv_heads).view(2, 1, self.num_kv_heads, 1)
        gather = (tables[None, :, None, :] * (2 * self.num_kv_heads) + side).reshape(-1)
        take, give = self._rows(batch, members, rows)
        device = batch.slots.device
        return Group(
            gather=gather.to(device),
            shape=(count, rows, length),
            mask=self._mask(batch, members, rows, length).to(device),
            take=take if isinstance(take, slice) else take.to(device),
            give=None if give is None else give.to(device),
        )

    def _rows(self, batch: ForwardBatch, members: list[int], rows: int) -> tuple[Tensor | slice, Tensor | None]:
        firsts = [batch.first_rows[b] for b in members]
        if all(batch.num_rows[b] == rows for b in members):
            if firsts == list(range(firsts[0], firsts[0] + rows * len(members), rows)):
                return slice(firsts[0], firsts[0] + rows * len(members)), None
            return (torch.tensor(firsts)[:, None] + torch.arange(rows)).view(-1), None
        counts = torch.tensor([batch.num_rows[b] for b in members])[:, None]
        steps = torch.arange(rows)
        take = (torch.tensor(firsts)[:, None] + torch.minimum(steps, counts - 1)).view(-1)
        return take, (steps < counts).view(-1).nonzero().view(-1)

    def _mask(self, batch: ForwardBatch, members: list[int], rows: int, length: int) -> Tensor:
        """Additive mask [B, 1, R * G padded, L]: 0 where a row sees a key, -inf elsewhere; padding sees everything."""
        count = len(members)
        context = torch.tensor([batch.context_lens[b] for b in members]).view(-1, 1, 1)
        keys = torch.arange(length)
        last = context + torch.arange(rows).view(1, -1, 1)  # a chain's row j sees keys up to context + j
        seen = keys <= last
        for i, b in enumerate(members):
            tree = batch.ancestors[b]
            if tree is not None:
                begin, own = batch.context_lens[b], len(tree)
                seen[i, :own, begin : begin + own] = torch.from_numpy(tree)
        if self.window is not None:
            seen &= keys > self._positions(batch, members, rows) - self.window
        mask = torch.zeros(count, rows, length, dtype=self.dtype).masked_fill_(~seen, -math.inf)
        groups = self.num_heads // self.num_kv_heads
        return F.pad(mask.repeat_interleave(groups, 1), (0, 0, 0, -rows * groups % QUERY_MULTIPLE)).unsqueeze(1)

    def _positions(self, batch: ForwardBatch, members: list[int], rows: int) -> Tensor:
        """Position of every padded row [B, R, 1]: a sliding window counts from the row's own depth, not from its slot."""
        out = torch.zeros(len(members), rows, 1, dtype=torch.int64)
        for i, b in enumerate(members):
            own = batch.positions[batch.first_rows[b] : batch.first_rows[b] + batch.num_rows[b]]
            out[i, : len(own), 0] = own.cpu()
        return out
