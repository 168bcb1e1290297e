"""Repetition, presence and frequency penalties of one sequence, at every node of its draft tree.

- repetition_penalty r (CTRL, arXiv 1909.05858; as in transformers and vLLM): a token seen in the prompt, the output or the
  node's path has its logit divided by r where positive, multiplied where negative.
- frequency_penalty f and presence_penalty p (OpenAI): f times the number of occurrences in the output and the path, and p if
  there is any, are subtracted. The prompt does not count.

Counts are kept per sequence and grow by what was committed: a step touches the distinct tokens, not the context.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.sequence import Sequence

Counts = NDArray[np.float32]


class Penalties:
    """The penalties of one sequence, with the counts of its committed tokens."""

    def __init__(self, seq: Sequence) -> None:
        params = seq.params
        self.repetition, self.presence, self.frequency = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self._read = 0 if self.repetition != 1 else seq.num_prompt  # the prompt matters to the repetition penalty alone
        self._seen: NDArray[np.bool_] = np.zeros(0, dtype=bool)  # [V], as the counts
        self._count: Counts = np.zeros(0, dtype=np.float32)  # occurrences in the output
        # What was seen, ascending: gathered and put back in 0.7 ms at 33 x 9,068, in the order of the text in 1.25.
        self._ids: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def apply(self, rows: Tensor, seq: Sequence, paths: Seq[Seq[int]]) -> None:
        """Penalise float32 rows [n, V] in place; paths[i] holds the draft tokens from the root to node i."""
        self._read_committed(seq, rows.shape[1])
        row, token, count = _occurrences(paths)
        if len(row):
            at = torch.from_numpy(np.stack((row, token))).to(rows.device).unbind(0)
            raw = rows[at]
        ids = torch.from_numpy(self._ids).to(rows.device)
        rows.index_copy_(1, ids, self._penalised(rows.index_select(1, ids), self._count[self._ids]))
        if len(row):
            rows[at] = self._penalised(raw, self._count[token] + count)

    def _penalised(self, logits: Tensor, counts: Counts) -> Tensor:
        """logits [..., T] of tokens that were seen, with their counts [T] in output and path."""
        if self.repetition != 1:
            # Divided where positive, else multiplied: 0.28 ms at 33 x 9,068, with torch.where on a mask 1.87.
            choose = torch.minimum if self.repetition > 1 else torch.maximum
            logits = choose(logits / self.repetition, logits * self.repetition)
        if self.frequency or self.presence:
            seen = torch.from_numpy(counts).to(logits.device)
            logits = logits - (self.frequency * seen + self.presence * (seen > 0))
        return logits

    def _read_committed(self, seq: Sequence, vocab_size: int) -> None:
        if not len(self._seen):
            self._seen, self._count = np.zeros(vocab_size, dtype=bool), np.zeros(vocab_size, dtype=np.float32)
        if self._read == seq.num_tokens:
            return
        new = np.array(seq.tokens[self._read :], dtype=np.int64)
        np.add.at(self._count, new[max(0, seq.num_prompt - self._read) :], 1)
        self._seen[new] = True
        self._ids = np.flatnonzero(self._seen)
        self._read = seq.num_tokens


def _occurrences(paths: Seq[Seq[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64], Counts]:
    """Which path has which token, and how often: index of the path, token, count, each pair once."""
    tokens = np.array(list(chain.from_iterable(paths)), dtype=np.int64)
    if not len(tokens):
        return tokens, tokens, tokens.astype(np.float32)
    width = int(tokens.max()) + 1
    pairs = np.repeat(np.arange(len(paths)), [len(path) for path in paths]) * width + tokens
    found, counts = np.unique(pairs, return_counts=True)
    return found // width, found % width, counts.astype(np.float32)
