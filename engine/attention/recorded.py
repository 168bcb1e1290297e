"""The Triton kernels' tables in memory that does not move, for steps that are recorded once and run again (engine/graphs.py).

What changes from step to step is contents: how many keys a part of a context has is read on the device, and sequences and rows
beyond a step's own are nobody's. Two copies go to the device per step: the block tables as far as they are used, and the rest.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from engine.attention.trees import Int, paths_of, words_of
from engine.block_table import stacked
from engine.models.batch import ForwardBatch
from engine.models.runner import Bucket
from kernels.interpreter import interpreted
from kernels.tree_attention import FIXED_MULTIPLE, MOST_PARTS, launched_parts, part_sizes, tree_attention
from kernels.write_kv import write_kv

MOST_PARTIAL_BYTES = 256 << 20  # of the parts' unmerged answers, where a fixed split would have many


class TritonRoom:
    """For the largest step; smaller ones take the beginning of everything. heads: query heads, key heads, head size."""

    name = "triton"

    def __init__(
        self,
        heads: tuple[int, int, int],
        block_size: int,
        dtype: torch.dtype,
        window: int | None,
        fixed_split: int,
        most: Bucket,
        longest: int,
        device: torch.device,
    ) -> None:
        """longest: keys of one context, a step's own rows among them."""
        self.heads, self.block_size, self.dtype, self.window, self.fixed_split = heads, block_size, dtype, window, fixed_split
        self.most, self.longest, self.device = most, longest, device
        self.num_words, self.depth = -(-most.rows // 32), most.rows if fixed_split else 0
        self.block_tables = torch.zeros(most.sequences, -(-longest // block_size), dtype=torch.int32, device=device)
        size = sum(int(np.prod(shape)) for shape in self.shapes(most))
        self.small = torch.zeros(size, dtype=torch.int32, device=device)

    def tables(self, bucket: Bucket, slots: Tensor, positions: Tensor) -> TritonTables:
        return TritonTables(self, bucket, slots, positions)

    def shapes(self, bucket: Bucket) -> list[tuple[int, ...]]:
        """Of what lies one behind the other in `small`: told, cu_q, context_lens, roots, words, paths."""
        rows, sequences = bucket.tokens, (bucket.sequences,)
        return [(2,), (bucket.sequences + 1,), sequences, sequences, (rows, self.num_words), (rows, self.depth)]


class TritonTables:
    """Of one bucket. Nobody owns a row until `write`."""

    def __init__(self, room: TritonRoom, bucket: Bucket, slots: Tensor, positions: Tensor) -> None:
        self._room, self._bucket = room, bucket
        self._slots, self._positions = slots, positions
        self._shapes = room.shapes(bucket)
        sizes = [int(np.prod(shape)) for shape in self._shapes]
        self._small = room.small[: sum(sizes)]
        pieces = zip(self._small.split(sizes), self._shapes, strict=True)
        self._told, self._cu_q, self._context_lens, self._roots, self._words, self._paths = (p.view(s) for p, s in pieces)
        self._block_tables = room.block_tables[: bucket.sequences]
        heads, _, size = room.heads
        self._rows_each = -(-bucket.tokens // bucket.sequences)  # what tiles are made for
        if room.fixed_split:
            held = MOST_PARTIAL_BYTES // (bucket.tokens * heads * size * 4)
            self._launched = max(1, min(-(-room.longest // room.fixed_split), held, MOST_PARTS))
            self.most_keys = self._launched * room.fixed_split
        else:
            self._launched = self._parts(bucket.tokens, bucket.least, room.longest)
            self.most_keys = room.longest
        self._small.zero_()
        self._small[:2] = torch.tensor([room.fixed_split or FIXED_MULTIPLE, 1], dtype=torch.int32)

    def fits(self, batch: ForwardBatch) -> bool:
        """Whether its contexts and trees do; sequences and rows are the bucket's affair."""
        room = self._room
        return (
            _most_keys(batch) <= self.most_keys
            and max(map(len, batch.block_tables), default=0) <= room.block_tables.shape[1]
            and max(batch.num_rows, default=0) <= room.most.rows
        )

    def write(self, batch: ForwardBatch) -> None:
        """The next run attends to this batch."""
        small = np.zeros(len(self._small), np.int32)
        ends = np.cumsum([int(np.prod(shape)) for shape in self._shapes])[:-1]
        pieces = zip(np.split(small, ends), self._shapes, strict=True)
        told, cu_q, context_lens, roots, words, paths = (piece.reshape(shape) for piece, shape in pieces)
        count = len(batch.num_rows)
        told[:] = self._part_sizes(batch)
        cu_q[1:] = batch.num_tokens
        cu_q[1 : count + 1] = np.cumsum(batch.num_rows)
        context_lens[:count] = batch.context_lens
        roots[:count] = [rows if tree is None else 0 for rows, tree in zip(batch.num_rows, batch.ancestors, strict=True)]
        self._write_trees(batch, words, paths)
        self._small.copy_(torch.from_numpy(small), non_blocking=True)
        used = stacked(batch.block_tables)
        # Contiguous to the device, and there to its place: a copy into a part of a table would wait for the device.
        there = torch.from_numpy(used).to(self._room.device, non_blocking=True)
        self._block_tables[:count, : used.shape[1]].copy_(there)

    def _write_trees(self, batch: ForwardBatch, words: Int, paths: Int) -> None:
        """A tree begins with a sequence's first row: to find out how long its trunk is takes longer than it saves."""
        seen = np.zeros((len(words), 32 * words.shape[1]), dtype=bool)
        for first, rows, tree in zip(batch.first_rows, batch.num_rows, batch.ancestors, strict=True):
            if tree is not None:
                seen[first : first + rows, :rows] = tree
                if paths.shape[1]:
                    paths[first : first + rows] = paths_of(tree, paths.shape[1])
        words[:] = words_of(seen)

    def run(self, kv: Tensor, q: Tensor, new: Tensor | None, scale: float) -> Tensor:
        """Store the rows' keys and values in one layer's kv, then attend. q [T, H, D], new [T, 2, K, D] -> [T, H * D]."""
        room = self._room
        with interpreted() if q.device.type == "cpu" else nullcontext():
            if new is not None:
                write_kv(kv, new, self._slots)
            out = tree_attention(
                q,
                kv,
                self._block_tables,
                self._cu_q,
                self._context_lens,
                self._words,
                scale,
                roots=self._roots,
                positions=self._positions,
                window=room.window,
                max_rows=self._rows_each,
                max_keys=self.most_keys,
                splits=self._launched,
                fixed_split=room.fixed_split,
                paths=self._paths if room.fixed_split else None,
                told=self._told if self._launched > 1 else None,
            )
        return out.flatten(1)

    def _part_sizes(self, batch: ForwardBatch) -> tuple[int, int]:
        """Keys of a part and parts in use: as the plain way would cut such a batch, as far as so many parts are launched."""
        room, keys = self._room, _most_keys(batch)
        if room.fixed_split:
            return room.fixed_split, max(-(-keys // room.fixed_split), 1)
        if room.window is not None:  # a part of the window's keys, from the first that a tile's first row sees
            keys = min(keys, room.window + max(batch.num_rows) + FIXED_MULTIPLE)
        wanted = self._parts(batch.num_tokens, len(batch.num_rows), keys)
        return part_sizes(keys, min(wanted, self._launched))

    def _parts(self, tokens: int, sequences: int, keys: int) -> int:
        heads, kv_heads, size = self._room.heads
        wide = self._room.dtype == torch.float32
        found = launched_parts(tokens, sequences, kv_heads, heads // kv_heads, size, wide, max(keys, 1), self._room.device)
        return min(found, MOST_PARTS)


def _most_keys(batch: ForwardBatch) -> int:
    return max((c + r for c, r in zip(batch.context_lens, batch.num_rows, strict=True)), default=0)
