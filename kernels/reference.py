"""The plain-torch twin of every kernel: the definition of "correct", and what the CPU backend runs.

Legend of shape suffixes: T fed rows of a step (all sequences together), B sequences, H query heads, K key/value heads,
G = H / K, D head size, L keys, N blocks in the pool, S tokens per block, W blocks in a block table, M moved tokens.

The KV pool of one layer is `kv [N, 2, K, S, D]` (keys, then values), which is FlashInfer's combined HND layout: one
head's keys of one block are contiguous, so a context is gathered in whole pieces of S * D elements. A slot is
`block * S + offset`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., C] / sqrt(mean(x^2) + eps) * weight [C]; computed in float32, rounded once, to x's dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum) of x, residual [T, C]; the sum is rounded to their dtype before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope_(qk: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate qk [T, heads, D] in place. cos, sin [T, 1, D]; sin carries the sign of rotate-half: its first half is negated."""
    rows, heads, size = qk.shape
    swapped = qk.view(rows, heads, 2, size // 2).flip(2).view(rows, heads, size)
    return qk.mul_(cos).addcmul_(swapped, sin)


def rope_write_kv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv: Tensor,
    slots: Tensor,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
) -> Tensor:
    """QK norm, rotation and cache write of one layer's qkv [T, (H + 2 K) * D]; rotates its queries in place, returns [T, H, D].

    cos, sin [P, 1, D] of all positions; positions, slots [T]; kv [N, 2, K, S, D]. A row with a negative slot is not stored.
    """
    num_kv_heads, _, size = kv.shape[2:]
    heads = num_heads + num_kv_heads
    qk = qkv[:, : heads * size].reshape(-1, heads, size).clone()
    if q_weight is not None and k_weight is not None:
        qk[:, :num_heads] = rms_norm(qk[:, :num_heads], q_weight, eps)
        qk[:, num_heads:] = rms_norm(qk[:, num_heads:], k_weight, eps)
    rope_(qk, cos[positions], sin[positions])
    new = torch.cat((qk[:, num_heads:], qkv[:, heads * size :].reshape(-1, num_kv_heads, size)), 1)
    stored = slots >= 0
    write_kv(kv, new[stored].unflatten(1, (2, num_kv_heads)).to(kv.dtype), slots[stored])
    queries = qkv[:, : num_heads * size].unflatten(1, (num_heads, size))
    return queries.copy_(qk[:, :num_heads])


def silu_mul(x: Tensor) -> Tensor:
    """silu(x[:, :I]) * x[:, I:] for x [T, 2 * I]: the gate's half first."""
    half = x.shape[-1] // 2
    return F.silu(x[:, :half]).mul_(x[:, half:])


def kv_rows(slots: Tensor, num_kv_heads: int, block_size: int) -> Tensor:
    """Rows of `kv.view(-1, D)` that hold the given slots [T]: [T, 2, K], in the order of `k` and `v` heads."""
    block, offset = slots // block_size, slots % block_size
    heads = torch.arange(2 * num_kv_heads, device=slots.device)
    rows = (block[:, None] * (2 * num_kv_heads) + heads) * block_size + offset[:, None]
    return rows.view(-1, 2, num_kv_heads)


def write_kv(kv: Tensor, new: Tensor, slots: Tensor) -> None:
    """Store new [T, 2, K, D] (keys and values of the fed rows) at slots [T] of kv [N, 2, K, S, D]."""
    rows = kv_rows(slots, kv.shape[2], kv.shape[3])
    kv.view(-1, kv.shape[-1]).index_copy_(0, rows.view(-1), new.reshape(-1, kv.shape[-1]))


def commit_kv(kv: Tensor, source: Tensor, target: Tensor) -> None:
    """Pack accepted paths: copy slots source [M] to target [M] in every layer of kv [layers, N, 2, K, S, D].

    All rows are read before any is written; source and target may overlap (a parallel copy in place would race).
    """
    block_size = kv.shape[4]
    moved = kv[:, source // block_size, :, :, source % block_size]
    kv[:, target // block_size, :, :, target % block_size] = moved


def copy_blocks(kv: Tensor, source: Tensor, target: Tensor) -> None:
    """Copy whole blocks source [M] to target [M] in every layer of kv [layers, N, 2, K, S, D]."""
    kv[:, target] = kv[:, source]


def tree_attention(
    q: Tensor, kv: Tensor, block_tables: Tensor, cu_q: Tensor, context_lens: Tensor, ancestors: Tensor, scale: float
) -> Tensor:
    """Paged attention of prompt chunks and draft trees; returns [T, H, D].

    q [T, H, D]; kv [N, 2, K, S, D]; block_tables [B, W]; cu_q [B + 1]; context_lens [B] (committed tokens before this
    step's rows); ancestors [T, max rows] bool: ancestors[t, j] says whether row t sees row j of its own sequence (row
    j of sequence b lies at position context_lens[b] + j of the block table). Every row sees the whole context.
    A prompt chunk is the case of a lower triangle. One loop turn per sequence: this is the definition, not the fast path.
    """
    out = torch.empty_like(q)
    num_kv_heads, block_size, size = kv.shape[2:]
    groups = q.shape[1] // num_kv_heads
    for b in range(len(context_lens)):
        first, last, context = int(cu_q[b]), int(cu_q[b + 1]), int(context_lens[b])
        length = context + last - first
        blocks = block_tables[b, : -(-length // block_size)]
        keys, values = kv[blocks].permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, size)[:, :, :length]
        seen = torch.ones(last - first, length, dtype=torch.bool, device=q.device)
        seen[:, context:] = ancestors[first:last, : last - first]
        rows = q[first:last].transpose(0, 1).float()  # [H, rows, D]
        scores = rows @ keys.repeat_interleave(groups, 0).transpose(1, 2).float() * scale
        weights = torch.softmax(scores.masked_fill(~seen, -math.inf), -1)
        out[first:last] = (weights @ values.repeat_interleave(groups, 0).float()).transpose(0, 1).to(q.dtype)
    return out
