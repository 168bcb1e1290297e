"""Natural-log probabilities for the API, from the raw target logits: no parameter of the request shapes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.messages import TokenLogprobs


def token_logprobs(logits: Tensor, chosen: Sequence[int], k: int) -> list[TokenLogprobs]:
    """One entry per row of logits [R, V] (any float type, computed in float32) for the token chosen there.

    rank is 1 + the number of likelier tokens; top holds the k likeliest, ties by lower id, so that a greedy choice is first.
    """
    if not chosen:
        return []
    rows = logits.float()
    ids = torch.tensor(chosen, dtype=torch.int64, device=rows.device)
    picked = rows.gather(1, ids.unsqueeze(1))
    norm = rows.logsumexp(-1, keepdim=True)
    ranks = (rows > picked).sum(-1) + 1
    top = _top(rows, norm, k)
    values = zip((picked - norm).squeeze(1).tolist(), ranks.tolist(), top, strict=True)
    return [TokenLogprobs(logprob, rank, likeliest) for logprob, rank, likeliest in values]


def _top(rows: Tensor, norm: Tensor, k: int) -> list[list[tuple[int, float]]]:
    """The k best of each row as (id, logprob), in order of (logprob descending, id ascending)."""
    k = min(k, rows.shape[1])
    if k == 0:
        return [[] for _ in rows]
    threshold = rows.topk(k, dim=-1).values[:, -1:]
    # topk breaks ties as it likes; all that reach its last value come in id order, and a stable sort keeps that order.
    row, token = (rows >= threshold).nonzero(as_tuple=True)
    logprobs = (rows[row, token] - norm[row, 0]).tolist()
    found: list[list[tuple[int, float]]] = [[] for _ in rows]
    for r, t, logprob in zip(row.tolist(), token.tolist(), logprobs, strict=True):
        found[r].append((t, logprob))
    return [sorted(entries, key=lambda entry: -entry[1])[:k] for entries in found]
