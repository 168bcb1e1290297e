"""One step's input to the model: the plan's rows and the draft forest, flattened into index tensors."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from engine.plan import Row
from engine.sequence import Sequence
from engine.tree import DraftForest


def padded_rows(rows: int) -> int:
    """Rows of a matrix product, rounded up: every other number of rows is another kernel that oneDNN compiles and keeps.

    64 requests at 32 streams with n-gram drafts left 908 MB of the heap in use unrounded, 606 MB rounded.
    """
    if rows <= 16:
        return rows
    step = 4 if rows <= 64 else 16 if rows <= 256 else 32
    return -(-rows // step) * step


@dataclass(slots=True)
class ForwardBatch:
    """T fed rows of B sequences, sequence after sequence; a sequence's rows are its uncomputed tokens, then its draft nodes.

    The last uncomputed token of a judged sequence is the root of its tree. Row j of sequence b is stored at position
    context_lens[b] + j of its block table and rotated by context + depth, so siblings share a position. Padding follows the
    last sequence: rows that belong to nobody and are stored in a block that belongs to nobody.
    """

    index: NDArray[np.int64]  # [3, T padded]: what follows, for a model that wants no tensors (a torch call costs 20 us here)
    token_ids: torch.Tensor  # [T padded] int64
    positions: torch.Tensor  # [T padded] int64
    slots: torch.Tensor  # [T padded] int64, where each row's keys and values go
    node_rows: torch.Tensor  # [nodes of the forest] int64: the fed row of every tree node
    num_rows: list[int]  # [B] fed rows of each sequence
    context_lens: list[int]  # [B] tokens computed before this step
    block_tables: list[list[int]]  # [B]
    ancestors: list[NDArray[np.bool_] | None]  # [B] [rows, rows]; None = a chain, that is, causal
    first_rows: list[int]  # [B] where each sequence's rows begin

    @property
    def num_tokens(self) -> int:
        return sum(self.num_rows)

    @classmethod
    def build(
        cls,
        seqs: Seq[Sequence],
        rows: Seq[Row],
        forest: DraftForest,
        trees: Seq[int],
        block_size: int,
        device: torch.device,
        scratch_slot: int | None = None,
    ) -> ForwardBatch:
        """`trees[b]` is the index of sequence b's tree in the forest, or -1 for a prompt chunk that is not judged.

        Rows are padded where there is a `scratch_slot` to store the padding in.
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        node_rows: list[int] = []
        num_rows: list[int] = []
        first_rows: list[int] = []
        ancestors: list[NDArray[np.bool_] | None] = []
        starts, node_tokens, depths = forest.start.tolist(), forest.token.tolist(), forest.depth.tolist()
        for seq, row, tree in zip(seqs, rows, trees, strict=True):
            first, context, new = len(tokens), row.num_computed, row.num_new
            first_rows.append(first)
            tokens += seq.tokens[context : context + new]
            positions += range(context, context + new)
            mask = None
            if tree >= 0:
                begin, end = starts[tree] + 1, starts[tree + 1]
                root = context + new - 1
                tokens += node_tokens[begin:end]
                positions += [root + depth for depth in depths[begin:end]]
                node_rows += range(first + new - 1, first + new + end - begin)
                if not _is_chain(depths, begin, end):
                    mask = _row_mask(new, forest.ancestors(tree))
            count = len(tokens) - first
            num_rows.append(count)
            ancestors.append(mask)
            blocks = seq.block_ids
            if count == 1:
                slots.append(blocks[context // block_size] * block_size + context % block_size)
            else:
                slots += [blocks[p // block_size] * block_size + p % block_size for p in range(context, context + count)]
        if scratch_slot is not None and (padding := padded_rows(len(tokens)) - len(tokens)):
            tokens += [0] * padding
            positions += [0] * padding
            slots += [scratch_slot] * padding
        index = np.array([tokens, positions, slots], dtype=np.int64)
        token_ids, position, slot = torch.from_numpy(index).to(device).unbind(0)
        return cls(
            index=index,
            token_ids=token_ids,
            positions=position,
            slots=slot,
            node_rows=torch.from_numpy(np.array(node_rows, dtype=np.int64)).to(device),
            num_rows=num_rows,
            context_lens=[row.num_computed for row in rows],
            block_tables=[seq.block_ids for seq in seqs],
            ancestors=ancestors,
            first_rows=first_rows,
        )


def _is_chain(depths: list[int], begin: int, end: int) -> bool:
    """Whether nodes begin..end of one tree (its root at begin - 1) lie one below the other."""
    return all(depths[node] == node - begin + 1 for node in range(begin, end))


def _row_mask(num_new: int, tree: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Visibility among one sequence's rows: a causal chunk that ends in the root, then the tree below it."""
    chunk = num_new - 1
    mask = np.zeros((chunk + len(tree), chunk + len(tree)), dtype=bool)
    mask[:chunk, :chunk] = np.tri(chunk, dtype=bool)
    mask[chunk:, :chunk] = True
    mask[chunk:, chunk:] = tree
    return mask
