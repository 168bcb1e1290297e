"""A toy language model: a random table of next-token laws, and the loop that decodes with it through drafts."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

from engine.protocols import Verifier
from engine.request import Request, SamplingParams
from engine.sequence import Sequence as Seq
from engine.target_law import TargetLaw
from engine.tree import DraftForest

Tree = tuple[list[int], list[int]]  # tokens and parents, node 0 the root
Guess = Callable[[Seq], Tree]


class ToyLM:
    """Logits that are a function of the whole context, standard normal times `sharpness`."""

    def __init__(self, vocab_size: int, seed: int, sharpness: float = 1.0, dtype: torch.dtype = torch.float64) -> None:
        self.vocab_size, self.seed, self.sharpness, self.dtype = vocab_size, seed, sharpness, dtype
        self._rows: dict[tuple[int, ...], np.ndarray] = {}

    def logits(self, context: Sequence[int]) -> np.ndarray:
        key = tuple(context)
        if key not in self._rows:
            rng = np.random.default_rng([self.seed, zlib.crc32(np.array(key, dtype=np.int32).tobytes())])
            self._rows[key] = self.sharpness * rng.standard_normal(self.vocab_size)
        return self._rows[key]

    def law(self, context: Sequence[int]) -> np.ndarray:
        odds = np.exp(self.logits(context))
        return odds / odds.sum()

    def forward(self, forest: DraftForest, seqs: Sequence[Seq]) -> Tensor:
        """One row per node: what comes after the sequence and the node's path."""
        rows = [
            self.logits(seq.tokens + forest.path(tree, node))
            for tree, seq in enumerate(seqs)
            for node in range(forest.size(tree))
        ]
        return torch.from_numpy(np.stack(rows)).to(self.dtype)

    def product_law(self, prompt: Sequence[int], length: int) -> dict[tuple[int, ...], float]:
        """The law of the first `length` tokens of plain sampling."""
        found = {}
        for tokens in product(range(self.vocab_size), repeat=length):
            context, probability = list(prompt), 1.0
            for token in tokens:
                probability *= self.law(context)[token]
                context.append(token)
            found[tokens] = probability
        return found


def sequence(prompt: Sequence[int] = (0,), seq_id: int = 0, eos_ids: frozenset[int] = frozenset(), **params: object) -> Seq:
    sampling = SamplingParams(**({"max_tokens": 10_000} | params))  # type: ignore[arg-type]  # values of many types
    return Seq(seq_id, Request(request_id=f"r{seq_id}", prompt_ids=list(prompt), params=sampling), 0, eos_ids)


def no_guess(seq: Seq) -> Tree:
    return [seq.tokens[-1]], [-1]


def decode(
    lm: ToyLM, seqs: Sequence[Seq], guess: Guess, verifier: Verifier, length: int, law: TargetLaw | None = None
) -> list[list[int]]:
    """Grow all sequences together by draft and verdict until each has ended or has `length` tokens out; those tokens."""
    while running := [seq for seq in seqs if not seq.finished and seq.num_output < length]:
        forest = DraftForest.from_parents([guess(seq) for seq in running])
        logits = lm.forward(forest, running)
        scores = logits if law is None else law(logits, running, forest)
        verdict = verifier.verify(forest, scores, running)
        for seq, nodes, tokens in zip(running, verdict.nodes, verdict.tokens, strict=True):
            assert len(tokens) == len(nodes) + 1
            seq.commit(tokens)
    return [seq.tokens[seq.num_prompt :][:length] for seq in seqs]
