"""What a request's parameters make of a draft model's logits: the cheap parts of the target law (engine/target_law.py).

Bias, allowed tokens, min_tokens, penalties and the temperature, so that the draft guesses at the law that will judge it. Not
bad_words, top_k, top_p and min_p: they rule out what the draft seldom guesses, and a filter of the target need not filter
the draft (core.md B.13). Leaving something out costs acceptance, never an answer.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from engine.penalties import Penalties
from engine.sequence import Sequence

MASKED = float("-inf")


class DraftLaw:
    """The law of one sequence's draft; softmax of what `apply` returns."""

    def __init__(self, seq: Sequence, eos_ids: frozenset[int]) -> None:
        p = seq.params
        self.seq = seq
        self._bias = p.logit_bias
        self._allowed = None if p.allowed_token_ids is None else torch.tensor(p.allowed_token_ids)
        self._ends = sorted({*p.stop_token_ids, *(() if p.ignore_eos else eos_ids)})
        penalised = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
        self._penalties = Penalties(seq) if penalised else None

    def apply(self, rows: Tensor, paths: Seq[Seq[int]]) -> None:
        """Shape float32 rows [n, V] in place; paths[i]: the draft tokens from the root to the node whose row it is."""
        p = self.seq.params
        for token, bias in self._bias.items():
            rows[:, token] += bias
        if self._allowed is not None:
            ids = self._allowed.to(rows.device)
            kept = rows[:, ids]
            rows.fill_(MASKED)
            rows[:, ids] = kept
        missing = p.min_tokens - self.seq.num_output
        if missing > 0 and self._ends:
            for i, path in enumerate(paths):
                if len(path) < missing:
                    rows[i, self._ends] = MASKED
        if self._penalties is not None:
            self._penalties.apply(rows, self.seq, paths)
        if not p.greedy and p.temperature != 1:
            rows.div_(p.temperature)
