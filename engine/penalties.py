"""Repetition, presence and frequency penalties of one sequence, at every node of its draft tree.

- repetition_penalty r (CTRL, arXiv 1909.05858; as in transformers and vLLM): a token seen in the prompt, the output or the
  node's path has its logit divided by r where positive, multiplied where negative.
- frequency_penalty f and presence_penalty p (OpenAI): f times the number of occurrences in the output and the path, and p if
  there is any, are subtracted. The prompt does not count.

Counts are kept per sequence and grow by what was committed: a step touches the distinct tokens, not the context.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from engine.sequence import Sequence


class Penalties:
    """The penalties of one sequence, with the counts of its committed tokens."""

    def __init__(self, seq: Sequence) -> None:
        params = seq.params
        self.repetition, self.presence, self.frequency = (
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
        )
        self._slot: dict[int, int] = {}  # token -> index into the two arrays
        self._ids = np.zeros(64, dtype=np.int64)
        self._count = np.zeros(64, dtype=np.float32)  # occurrences in the output
        self._read = 0 if self.repetition != 1 else seq.num_prompt  # the prompt matters to the repetition penalty alone

    def apply(self, rows: Tensor, seq: Sequence, paths: Seq[Seq[int]]) -> None:
        """Penalise float32 rows [n, V] in place; paths[i] holds the draft tokens from the root to node i."""
        self._read_committed(seq)
        pairs = [(i, token, count) for i, path in enumerate(paths) for token, count in Counter(path).items()]
        if pairs:
            at = torch.tensor([p[:2] for p in pairs], device=rows.device).unbind(1)
            raw = rows[at]
        used = len(self._slot)
        ids = torch.from_numpy(self._ids[:used]).to(rows.device)
        counts = torch.from_numpy(self._count[:used]).to(rows.device)
        rows[:, ids] = self._penalised(rows[:, ids], counts)
        if pairs:
            counts_on_path = torch.tensor([self._committed(p[1]) + p[2] for p in pairs], dtype=torch.float32, device=rows.device)
            rows[at] = self._penalised(raw, counts_on_path)

    def _penalised(self, logits: Tensor, counts: Tensor) -> Tensor:
        if self.repetition != 1:
            logits = torch.where(logits > 0, logits / self.repetition, logits * self.repetition)
        if self.frequency or self.presence:
            logits = logits - (self.frequency * counts + self.presence * (counts > 0))
        return logits

    def _committed(self, token: int) -> float:
        slot = self._slot.get(token)
        return 0.0 if slot is None else float(self._count[slot])

    def _read_committed(self, seq: Sequence) -> None:
        for position in range(self._read, seq.num_tokens):
            token = seq.tokens[position]
            slot = self._slot.get(token)
            if slot is None:
                slot = self._slot[token] = len(self._slot)
                if slot == len(self._ids):
                    self._ids, self._count = (np.concatenate([a, np.zeros_like(a)]) for a in (self._ids, self._count))
                self._ids[slot] = token
            if position >= seq.num_prompt:
                self._count[slot] += 1
        self._read = seq.num_tokens
