"""The plainest attention with a cache: keys and values in lists, one sequence and one head at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Rows:
    """Rows of one sequence in one step. sees[i, j]: row i sees row j; position of row i is context + depth[i]."""

    tokens: list[int]
    depth: list[int]
    sees: Tensor

    @classmethod
    def chain(cls, tokens: list[int]) -> Rows:
        count = len(tokens)
        return cls(tokens, list(range(count)), torch.ones(count, count).tril().bool())

    @classmethod
    def tree(cls, tokens: list[int], parents: list[int]) -> Rows:
        sees = torch.eye(len(tokens)).bool()
        depth = [0] * len(tokens)
        for i, parent in enumerate(parents):
            if parent >= 0:
                sees[i] |= sees[parent]
                depth[i] = depth[parent] + 1
        return cls(tokens, depth, sees)


@dataclass
class Context:
    """Per layer, the keys and values [n, 2, K, D] of a sequence's committed tokens."""

    layers: dict[int, Tensor] = field(default_factory=dict)
    length: int = 0


def step(
    model: Any, contexts: list[Context], rows: list[Rows], keep: bool = True, window: int | None = None, **options: Any
) -> tuple[Tensor, dict[int, Tensor]]:
    """Feed each sequence its rows, all in one flat forward. Returns what the model's forward returns."""
    starts = [sum(len(r.tokens) for r in rows[:i]) for i in range(len(rows) + 1)]
    before = [context.length for context in contexts]

    def attend(layer: int, q: Tensor, new: Tensor, scale: float) -> Tensor:
        out = torch.empty_like(q)
        for i, (context, row) in enumerate(zip(contexts, rows, strict=True)):
            own = slice(starts[i], starts[i + 1])
            past = context.layers.get(layer, new[:0])
            seen = torch.cat((past, new[own]))
            mask = torch.cat((torch.ones(len(row.tokens), before[i]).bool(), row.sees), dim=1)
            if window is not None:
                places = torch.tensor([*range(before[i]), *(before[i] + d for d in row.depth)])
                mask &= places[before[i] :, None] - places[None] < window
            for head in range(q.shape[1]):
                key, value = seen[:, :, head * new.shape[2] // q.shape[1]].unbind(1)
                scores = (q[own, head].float() @ key.float().T * scale).masked_fill(~mask, float("-inf"))
                out[own, head] = (scores.softmax(-1) @ value.float()).to(q.dtype)
            if keep:
                context.layers[layer] = seen.clone()
        return out.flatten(1)

    tokens = torch.tensor([token for row in rows for token in row.tokens])
    positions = torch.tensor([before[i] + d for i, row in enumerate(rows) for d in row.depth])
    result = model.forward(tokens, positions, attend, **options)
    if keep:
        for context, row in zip(contexts, rows, strict=True):
            context.length += len(row.tokens)
    return result


def greedy(model: Any, prompts: list[list[int]], count: int, chunk: int = 4, window: int | None = None) -> list[list[int]]:
    """`count` tokens for every prompt, all of them in the same steps; prompts go in `chunk` tokens at a time."""
    contexts = [Context() for _ in prompts]
    done = [list(prompt) for prompt in prompts]
    while any(len(d) < len(p) + count for d, p in zip(done, prompts, strict=True)):
        busy = [i for i, p in enumerate(prompts) if len(done[i]) < len(p) + count]
        rows = [Rows.chain(done[i][contexts[i].length :][:chunk]) for i in busy]
        hidden, _ = step(model, [contexts[i] for i in busy], rows, window=window)
        last = torch.tensor([len(r.tokens) for r in rows]).cumsum(0) - 1
        for i, token in zip(busy, model.logits(hidden[last]).argmax(-1).tolist(), strict=True):
            if contexts[i].length == len(done[i]):
                done[i].append(token)
    return [d[len(p) :] for d, p in zip(done, prompts, strict=True)]


def own_greedy(made: Any, prompt: list[int], count: int) -> list[int]:
    """transformers' generate on one prompt alone."""
    made.generation_config.eos_token_id = None
    ids = torch.tensor([prompt])
    out = made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()
