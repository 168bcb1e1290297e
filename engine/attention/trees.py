"""Who sees whom among a step's own rows, as the Triton kernels are told: words of bits, and paths. Numbers on the host."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.models.batch import ForwardBatch

Mask = NDArray[np.bool_]
Int = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Trees:
    """Of each sequence: how many of its rows are a chunk that all later ones see, and who sees whom among the others, if any."""

    roots: Int  # [B]
    masks: list[Mask | None]  # [B]

    @classmethod
    def of(cls, batch: ForwardBatch) -> Trees:
        found = [_split(mask, rows) for mask, rows in zip(batch.ancestors, batch.num_rows, strict=True)]
        return cls(np.array([root for root, _ in found], np.int32), [mask for _, mask in found])

    @property
    def num_words(self) -> int:
        """Words that a row of the largest tree needs; 0: nothing branches."""
        return -(-max((len(mask) for mask in self.masks if mask is not None), default=0) // 32)

    @property
    def depth(self) -> int:
        """Nodes of the longest path, the root included; 0: nothing branches."""
        return max((int(mask.sum(1).max()) for mask in self.masks if mask is not None), default=0)

    def write(self, batch: ForwardBatch, words: Int, paths: Int) -> None:
        """Fill words [T, num_words or more], and the trees' rows of paths [T, depth or more, or 0]."""
        seen = np.zeros((len(words), 32 * words.shape[1]), dtype=bool)
        for first, rows, root, mask in zip(batch.first_rows, batch.num_rows, self.roots.tolist(), self.masks, strict=True):
            if mask is not None:
                seen[first + root : first + rows, : len(mask)] = mask
                if paths.shape[1]:
                    paths[first + root : first + rows] = paths_of(mask, paths.shape[1])
        words[:] = words_of(seen)


def _split(mask: Mask | None, rows: int) -> tuple[int, Mask | None]:
    """A sequence's rows that all later ones see are a chunk; how many these are, and who sees whom among the others, if any."""
    if mask is None:
        return rows, None
    shared = mask.sum(0) == np.arange(rows, 0, -1)  # nobody sees who comes later
    root = rows if shared.all() else int(shared.argmin())
    return root, mask[root:, root:] if root < rows else None


def words_of(seen: Mask) -> Int:
    """bool [n, 32 * words] -> int32 words [n, words]."""
    return np.packbits(seen, axis=1, bitorder="little").view("<i4")


def paths_of(mask: Mask, depth: int) -> Int:
    """[n, depth]: whom each row sees, in order; behind itself anything."""
    order = np.argsort(~mask, axis=1, kind="stable")[:, :depth]
    return np.pad(order, ((0, 0), (0, depth - order.shape[1]))).astype(np.int32)
