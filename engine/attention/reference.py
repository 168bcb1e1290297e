"""Paged tree attention in plain torch, tuned for CPUs: planned once per step, run once per layer, batched over sequences.

A sequence's rows are cut into segments where they cross a multiple of `SPAN`, and segments of like shape are attended together:
one gather brings their contexts out of the pool, two batched matmuls with a masked softmax between them serve all. So a
long prompt chunk skips the keys behind each segment. Tested against `kernels.reference.tree_attention`, the definition.

A row's result is bit for bit the same whatever shares the step with it (torch 2.13; tests/engine/test_row_invariance.py). In bf16
oneDNN's matmuls give that nearly by themselves: they sum in another order for a single row, and beyond 1,024 keys. In float32
MKL's do so below four rows and with every other number of keys. Hence rows are padded, contexts on either side of 1,024
keys are kept apart, and in float32 keys come in whole spans, whose number follows from a row's own position.
SDPA's CPU kernel was measured too (bf16, 3 key heads of 64, two threads, us at 1 / 4 / 16 sequences of 256 keys): SDPA
21 / 53 / 202, matmuls 38 / 49 / 106; 28 rows of one sequence 56 and 50, a prompt chunk 772 and 296. It differs from float32
logits by as much (KL 0.00094 on 4,000 tokens of text, both).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.models.batch import ForwardBatch
from kernels import reference

SPAN = 128  # keys
KEY_MULTIPLE = 64
SEGMENT_MULTIPLE = 4  # beyond 8 segments
BLOCKED_KEYS = 1024  # beyond as many, oneDNN sums in blocks
MIN_ROWS = {torch.bfloat16: 2}  # query rows of one key head
OTHER_MIN_ROWS = 4
# Shapes are rounded up, or oneDNN compiles and keeps kernels for ever new ones: rows to one of these, keys and segments as below.
ROW_CLASSES = (1, 4, 12, 32, 64, 128)
MAX_PADDING = 2  # a group's longest context is at most this many times its shortest, or two spans longer


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows first ... first + count of one sequence's fed rows, and the keys that the last of them needs."""

    member: int  # index of the sequence in the batch
    first: int
    count: int
    num_keys: int


@dataclass(slots=True)
class Group:
    """Segments that are attended in one call: S segments, R rows each (padded), L keys."""

    gather: Tensor  # [2 * S * K * W] rows of kv.view(-1, block size * D): the blocks of the contexts
    num_segments: int
    num_rows: int
    num_keys: int
    mask: Tensor  # [S * K, R * G padded, L] additive, in the model's dtype
    take: Tensor | slice  # fed rows of the group, padded: [S * R], or a slice when nothing is padded
    give: Tensor | None  # positions in the padded output [rows of the group]; None when nothing is padded


class ReferenceAttention:
    """The CPU's attention backend; it runs on any device."""

    name = "reference"

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype, window: int | None
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.per_head = num_heads // num_kv_heads
        self.block_size, self.dtype, self.window = block_size, dtype, window
        self.exact_keys = dtype != torch.bfloat16
        self.min_rows = MIN_ROWS.get(dtype, OTHER_MIN_ROWS)
        self.groups: list[Group] = []
        self.kv_rows = torch.empty(0, dtype=torch.int64)

    def plan(self, batch: ForwardBatch) -> None:
        """Index tensors and masks of one step, shared by all layers."""
        self.kv_rows = reference.kv_rows(batch.slots, self.num_kv_heads, self.block_size).view(-1)
        alike: dict[int, list[Segment]] = defaultdict(list)
        for member, (context, rows) in enumerate(zip(batch.context_lens, batch.num_rows, strict=True)):
            for segment in self._segments(member, context, rows):
                alike[next(size for size in ROW_CLASSES if segment.count <= size)].append(segment)
        self.groups = [
            self._group(batch, _padded(group), rows) for rows, segments in alike.items() for group in self._by_length(segments)
        ]

    def run(self, kv: Tensor, q: Tensor, new: Tensor | None, scale: float) -> Tensor:
        """Store the fed rows' keys and values in one layer's kv, then attend. q [T, H, D], new [T, 2, K, D] -> [T, H * D]."""
        if new is not None:
            kv.view(-1, self.head_dim).index_copy_(0, self.kv_rows, new.reshape(-1, self.head_dim))
        if len(self.groups) == 1 and self.groups[0].take == slice(0, len(q)):
            return self._attend(kv, q, self.groups[0], scale)
        out = q.new_zeros(q.shape[0], self.num_heads * self.head_dim)
        for group in self.groups:
            rows = self._attend(kv, q[group.take], group, scale)
            if group.give is None:
                out[group.take] = rows
            else:
                out[group.take[group.give]] = rows[group.give]  # type: ignore[index]  # padded groups take by tensor
        return out

    def _attend(self, kv: Tensor, q: Tensor, group: Group, scale: float) -> Tensor:
        """q [S * R, H, D] of one group -> [S * R, H * D]."""
        count, rows, heads, size = group.num_segments, group.num_rows, self.num_kv_heads, self.head_dim
        blocks = kv.view(-1, self.block_size * size).index_select(0, group.gather)
        keys, values = blocks.view(2, count, heads, -1, size)[:, :, :, : group.num_keys]
        if rows == 1:
            q = q.view(count, heads, self.per_head, size)
        else:
            q = q.view(count, rows, heads, self.per_head, size).transpose(1, 2).reshape(count, heads, -1, size)
        used, padded = rows * self.per_head, group.mask.shape[1]
        if used != padded:
            q = F.pad(q, (0, 0, 0, padded - used))
        flat = (count * heads, -1, size)
        scores = torch.baddbmm(group.mask, q.reshape(flat), keys.reshape(flat).transpose(1, 2), alpha=scale)
        out = torch.bmm(torch.softmax(scores, -1), values.reshape(flat)).view(count, heads, padded, size)[:, :, :used]
        if rows > 1:
            out = out.reshape(count, heads, rows, self.per_head, size).transpose(1, 2)
        return out.reshape(count * rows, self.num_heads * size)

    def _segments(self, member: int, context: int, rows: int) -> Iterator[Segment]:
        multiple = SPAN if self.exact_keys else KEY_MULTIPLE
        first = 0
        while first < rows:
            count = min(rows - first, SPAN - (context + first) % SPAN)
            num_keys = -(-(context + first + count) // multiple) * multiple
            yield Segment(member, first, count, num_keys)
            first += count

    def _by_length(self, segments: list[Segment]) -> Iterator[list[Segment]]:
        """Groups that pad little, or nothing where the number of keys must be exact."""
        group: list[Segment] = []
        for segment in sorted(segments, key=attrgetter("num_keys")):
            if group and segment.num_keys > self._longest_beside(group[0].num_keys):
                yield sorted(group, key=attrgetter("member", "first"))
                group = []
            group.append(segment)
        if group:
            yield sorted(group, key=attrgetter("member", "first"))

    def _longest_beside(self, num_keys: int) -> int:
        """The most keys of a segment that may be attended together with a shortest one of `num_keys`."""
        if self.exact_keys:
            return num_keys
        most = max(MAX_PADDING * num_keys, num_keys + 2 * SPAN)
        return min(most, BLOCKED_KEYS) if num_keys <= BLOCKED_KEYS else most

    def _group(self, batch: ForwardBatch, segments: list[Segment], rows: int) -> Group:
        num_keys = max(segment.num_keys for segment in segments)
        width = -(-num_keys // self.block_size)
        tables = np.empty((len(segments), width), dtype=np.int64)
        for i, segment in enumerate(segments):
            table = batch.block_tables[segment.member][:width]
            tables[i, : len(table)] = table
            # Keys beyond the table are masked, which NaN survives: a sequence reads no block but its own.
            tables[i, len(table) :] = table[0]
        side = np.arange(2 * self.num_kv_heads).reshape(2, 1, self.num_kv_heads, 1)
        gather = (tables[None, :, None, :] * (2 * self.num_kv_heads) + side).reshape(-1)
        take, give = _rows(batch, segments, rows)
        device = batch.slots.device
        return Group(
            gather=torch.from_numpy(gather).to(device),
            num_segments=len(segments),
            num_rows=rows,
            num_keys=num_keys,
            mask=torch.from_numpy(self._mask(batch, segments, rows, num_keys)).to(device=device, dtype=self.dtype),
            take=take if isinstance(take, slice) else torch.from_numpy(take).to(device),
            give=None if give is None else torch.from_numpy(give).to(device),
        )

    def _mask(self, batch: ForwardBatch, segments: list[Segment], rows: int, num_keys: int) -> np.ndarray:
        """Additive mask [S * K, R * G padded, L]: 0 where a row sees a key, -inf elsewhere; padding sees everything."""
        keys = np.arange(num_keys)
        start = np.array([batch.context_lens[segment.member] + segment.first for segment in segments])
        place = start[:, None, None] + np.arange(rows)[:, None]  # [S, R, 1]
        seen = keys <= place
        for i, segment in enumerate(segments):
            tree = batch.ancestors[segment.member]
            if tree is not None:
                context, last = batch.context_lens[segment.member], segment.first + segment.count
                width = min(len(tree), num_keys - context)
                seen[i, : segment.count, context : context + width] = tree[segment.first : last, :width]
        if self.window is not None:
            seen &= keys > _positions(batch, segments, place) - self.window
        mask = np.where(seen, np.float32(0), np.float32(-np.inf)).repeat(self.per_head, axis=1)
        padding = max(self.min_rows - rows * self.per_head, 0)
        return np.pad(mask, ((0, 0), (0, padding), (0, 0))).repeat(self.num_kv_heads, axis=0)


def _padded(segments: list[Segment]) -> list[Segment]:
    """With empty segments up to the next number of segments that kernels are kept for."""
    if len(segments) <= 2 * SEGMENT_MULTIPLE:
        return segments
    return segments + [replace(segments[0], count=0)] * (-len(segments) % SEGMENT_MULTIPLE)


def _positions(batch: ForwardBatch, segments: list[Segment], place: np.ndarray) -> np.ndarray:
    """Position of every row [S, R, 1]: a sliding window counts from a row's depth, not from its slot."""
    positions = place.copy()
    own = batch.positions.tolist()
    for i, segment in enumerate(segments):
        begin = batch.first_rows[segment.member] + segment.first
        positions[i, : segment.count, 0] = own[begin : begin + segment.count]
    return positions


def _rows(batch: ForwardBatch, segments: list[Segment], rows: int) -> tuple[np.ndarray | slice, np.ndarray | None]:
    """Which fed rows a group takes, and which of its padded rows it gives back (None: all)."""
    firsts = [batch.first_rows[segment.member] + segment.first for segment in segments]
    if all(segment.count == rows for segment in segments):
        if firsts == list(range(firsts[0], firsts[0] + rows * len(firsts), rows)):
            return slice(firsts[0], firsts[0] + rows * len(firsts)), None
        return (np.array(firsts)[:, None] + np.arange(rows)).reshape(-1), None
    counts = np.array([segment.count for segment in segments])[:, None]
    steps = np.arange(rows)
    take = (np.array(firsts)[:, None] + np.minimum(steps, np.maximum(counts - 1, 0))).reshape(-1)
    return take, np.flatnonzero(steps < counts)
